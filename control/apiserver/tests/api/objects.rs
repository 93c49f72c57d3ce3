//! Owns what can be done with objects: writing, reading, watching, deleting.

use crate::support::Cluster;
use serde_json::{Value, json};

const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PODS: &str = "/api/v1/namespaces/default/pods";

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"n": name}},
        "data": {"a": "1"}})
}

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

#[tokio::test]
async fn write_read_delete() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let made = http.create(CONFIG_MAPS, &config_map("a")).await;
    let metadata = &made["metadata"];
    assert!(metadata["uid"].is_string() && metadata["creationTimestamp"].is_string());
    let read = http.get(&format!("{CONFIG_MAPS}/a")).await;
    assert_eq!((read.code, &read.json()), (200, &made));
    assert_eq!(
        http.post(CONFIG_MAPS, &config_map("a")).await.failure(),
        (409, "AlreadyExists".into(), "configmaps \"a\" already exists".into())
    );
    // A stale revision is refused, the present one isn't, and a write of the same changes nothing.
    let mut stale = made.clone();
    let mut changed = made.clone();
    changed["data"]["a"] = json!("2");
    let second = http.put(&format!("{CONFIG_MAPS}/a"), &changed).await;
    assert_eq!(second.code, 200, "{}", second.text);
    stale["data"]["a"] = json!("3");
    let (code, reason, message) = http.put(&format!("{CONFIG_MAPS}/a"), &stale).await.failure();
    assert_eq!((code, reason.as_str()), (409, "Conflict"));
    assert_eq!(
        message,
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; \
        please apply your changes to the latest version and try again"
    );
    let same = http.put(&format!("{CONFIG_MAPS}/a"), &second.json()).await.json();
    assert_eq!(same["metadata"]["resourceVersion"], second.json()["metadata"]["resourceVersion"]);
    let patched = http.merge(&format!("{CONFIG_MAPS}/a"), &json!({"data": {"b": "x"}})).await.json();
    assert_eq!(patched["data"], json!({"a": "2", "b": "x"}));
    let gone = http.delete(&format!("{CONFIG_MAPS}/a")).await;
    assert_eq!((gone.code, &gone.json()["status"]), (200, &json!("Success")));
    assert_eq!(
        http.get(&format!("{CONFIG_MAPS}/a")).await.failure(),
        (404, "NotFound".into(), "configmaps \"a\" not found".into())
    );
    cluster.stop().await;
}

#[tokio::test]
async fn names_are_generated_and_dry_runs_write_nothing() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let generated = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "g-"}});
    let name = http.create(CONFIG_MAPS, &generated).await["metadata"]["name"].as_str().unwrap().to_owned();
    assert!(name.starts_with("g-") && name.len() == 7, "{name}");
    http.create(&format!("{CONFIG_MAPS}?dryRun=All"), &config_map("dry")).await;
    assert_eq!(http.get(&format!("{CONFIG_MAPS}/dry")).await.code, 404);
    let answer = http.delete(&format!("{CONFIG_MAPS}/{name}?dryRun=All")).await;
    assert_eq!(answer.code, 200, "{}", answer.text);
    assert_eq!(http.get(&format!("{CONFIG_MAPS}/{name}")).await.code, 200);
    cluster.stop().await;
}

#[tokio::test]
async fn lists_are_paged_at_one_revision_and_selected() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    for index in 0..7 {
        http.create(CONFIG_MAPS, &config_map(&format!("p{index}"))).await;
    }
    let first = http.get(&format!("{CONFIG_MAPS}?limit=3")).await.json();
    assert_eq!(first["kind"], "ConfigMapList");
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    let names = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap();
        items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let token = first["metadata"]["continue"].as_str().unwrap().to_owned();
    let rest = http.get(&format!("{CONFIG_MAPS}?limit=10&continue={token}")).await.json();
    assert_eq!([names(&first), names(&rest)].concat(), ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]);
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    assert!(rest["metadata"]["continue"].is_null());
    let some = http.get(&format!("{CONFIG_MAPS}?labelSelector=n+in+(p1,p2)")).await.json();
    assert_eq!(names(&some), ["p1", "p2"]);
    let one = http.get("/api/v1/configmaps?fieldSelector=metadata.name%3Dp3").await.json();
    assert_eq!(names(&one), ["p3"]);
    assert_eq!(http.get(&format!("{CONFIG_MAPS}?continue=x")).await.code, 400);
    assert_eq!(http.get(&format!("{CONFIG_MAPS}?labelSelector=a=b=c")).await.code, 400);
    assert_eq!(http.get(&format!("{CONFIG_MAPS}?fieldSelector=data.a%3D1")).await.code, 400);
    assert_eq!(http.get(&format!("{CONFIG_MAPS}?resourceVersion=x")).await.code, 400);
    let table = http
        .send("GET", CONFIG_MAPS, &[("accept", "application/json;as=Table;v=v1;g=meta.k8s.io")], "")
        .await
        .json();
    assert_eq!((&table["kind"], table["rows"].as_array().unwrap().len()), (&json!("Table"), 7));
    let bare = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
    let bare = http.send("GET", CONFIG_MAPS, &[("accept", bare)], "").await.json();
    assert_eq!(bare["kind"], "PartialObjectMetadataList");
    assert!(bare["items"][0]["data"].is_null());
    let answer =
        http.send("GET", CONFIG_MAPS, &[("accept", "application/vnd.kubernetes.protobuf")], "").await;
    assert_eq!(answer.code, 406);
    cluster.stop().await;
}

/// The events of a watch that ends by itself after a second.
async fn watch(http: &crate::support::Http, path: &str) -> Vec<Value> {
    let answer = http.get(&format!("{path}&timeoutSeconds=1")).await;
    assert_eq!(answer.code, 200, "{}", answer.text);
    answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn summary(events: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    events.iter().map(|e| (text(&e["type"]), text(&e["object"]["metadata"]["name"]))).collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[tokio::test]
async fn watches_resume_and_follow_selectors() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let start =
        http.get(CONFIG_MAPS).await.json()["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    http.create(CONFIG_MAPS, &config_map("a")).await;
    http.merge(&format!("{CONFIG_MAPS}/a"), &json!({"metadata": {"labels": {"n": "b"}}})).await;
    http.delete(&format!("{CONFIG_MAPS}/a")).await;
    let events = watch(&http, &format!("{CONFIG_MAPS}?watch=1&resourceVersion={start}")).await;
    assert_eq!(summary(&events), pairs(&[("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]));
    let revision = |event: &Value| -> u64 {
        event["object"]["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap()
    };
    assert!(revision(&events[0]) < revision(&events[1]) && revision(&events[1]) < revision(&events[2]));
    // What leaves the selection is deleted for this watcher, with its last selected state.
    let path = format!("{CONFIG_MAPS}?watch=1&resourceVersion={start}&labelSelector=n%3Da");
    let events = watch(&http, &path).await;
    assert_eq!(summary(&events), pairs(&[("ADDED", "a"), ("DELETED", "a")]));
    assert_eq!(events[1]["object"]["metadata"]["labels"]["n"], "a");
    let path = format!("{CONFIG_MAPS}?watch=1&resourceVersion={start}&labelSelector=n%3Db");
    assert_eq!(summary(&watch(&http, &path).await), pairs(&[("ADDED", "a"), ("DELETED", "a")]));
    // A list as a watch: the objects, then a bookmark that ends them.
    http.create(CONFIG_MAPS, &config_map("b")).await;
    let path = format!(
        "{CONFIG_MAPS}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    );
    let events = watch(&http, &path).await;
    assert_eq!(summary(&events), pairs(&[("ADDED", "b"), ("BOOKMARK", "")]));
    assert_eq!(events[1]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    // A revision from before the server's memory.
    let events = watch(&http, &format!("{CONFIG_MAPS}?watch=1&resourceVersion=1")).await;
    if events[0]["type"] == "ERROR" {
        assert_eq!(
            (&events[0]["object"]["code"], &events[0]["object"]["reason"]),
            (&json!(410), &json!("Expired"))
        );
    }
    cluster.stop().await;
}

#[tokio::test]
async fn finalizers_and_propagation_hold_an_object() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let mut held = config_map("held");
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    http.create(CONFIG_MAPS, &held).await;
    let path = format!("{CONFIG_MAPS}/held");
    let marked = http.delete(&path).await.json();
    assert!(marked["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(http.get(&path).await.code, 200);
    http.merge(&path, &json!({"metadata": {"finalizers": null}})).await;
    assert_eq!(http.get(&path).await.code, 404);
    http.create(CONFIG_MAPS, &config_map("owner")).await;
    let path = format!("{CONFIG_MAPS}/owner");
    let marked = http.delete(&format!("{path}?propagationPolicy=Foreground")).await.json();
    assert_eq!(marked["metadata"]["finalizers"], json!(["foregroundDeletion"]));
    let uid = json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": "other"}});
    let answer = http.send("DELETE", &path, &[("content-type", "application/json")], &uid.to_string()).await;
    assert_eq!(answer.code, 409);
    http.create(CONFIG_MAPS, &config_map("c1")).await;
    http.create(CONFIG_MAPS, &config_map("c2")).await;
    let answer = http.delete(&format!("{CONFIG_MAPS}?labelSelector=n+in+(c1,c2)")).await;
    assert_eq!((answer.code, answer.json()["items"].as_array().unwrap().len()), (200, 2));
    assert_eq!(http.get(&format!("{CONFIG_MAPS}/c1")).await.code, 404);
    cluster.stop().await;
}

#[tokio::test]
async fn pods_get_what_admission_gives_and_are_bound_once() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let (code, reason, message) = http.post(PODS, &pod("early")).await.failure();
    assert_eq!((code, reason.as_str()), (403, "Forbidden"));
    assert_eq!(
        message,
        "pods \"early\" is forbidden: error looking up service account default/default: \
        serviceaccount \"default\" not found"
    );
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    http.create("/api/v1/namespaces/default/serviceaccounts", &account).await;
    let made = http.create(PODS, &pod("a")).await;
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    assert!(made["spec"]["volumes"][0]["name"].as_str().unwrap().starts_with("kube-api-access-"));
    assert_eq!(made["spec"]["tolerations"].as_array().unwrap().len(), 2);
    assert_eq!((&made["spec"]["priority"], &made["status"]["phase"]), (&json!(0), &json!("Pending")));
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "a"},
        "target": {"apiVersion": "v1", "kind": "Node", "name": "n1"}});
    assert_eq!(http.post(&format!("{PODS}/a/binding"), &binding).await.code, 201);
    let bound = http.get(&format!("{PODS}/a")).await.json();
    assert_eq!(bound["spec"]["nodeName"], "n1");
    assert!(bound["status"]["conditions"].as_array().unwrap().iter().any(|c| c["type"] == "PodScheduled"));
    let again = http.post(&format!("{PODS}/a/binding"), &binding).await.failure();
    assert_eq!(again.0, 409, "{}", again.2);
    // A pod on a node gets its grace; asked again with none it goes.
    let marked = http.delete(&format!("{PODS}/a")).await.json();
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    assert_eq!(http.delete(&format!("{PODS}/a?gracePeriodSeconds=0")).await.code, 200);
    assert_eq!(http.get(&format!("{PODS}/a")).await.code, 404);
    // One without a node goes at once.
    http.create(PODS, &pod("b")).await;
    http.delete(&format!("{PODS}/b")).await;
    assert_eq!(http.get(&format!("{PODS}/b")).await.code, 404);
    let mut critical = pod("c");
    critical["spec"]["priorityClassName"] = json!("system-node-critical");
    assert_eq!(http.create(PODS, &critical).await["spec"]["priority"], 2_000_001_000);
    critical["spec"]["priorityClassName"] = json!("none-such");
    critical["metadata"]["name"] = json!("d");
    assert_eq!(http.post(PODS, &critical).await.code, 403);
    cluster.stop().await;
}

#[tokio::test]
async fn namespaces_end_in_order() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}});
    let made = http.create("/api/v1/namespaces", &namespace).await;
    assert_eq!(
        (&made["spec"]["finalizers"], &made["status"]["phase"]),
        (&json!(["kubernetes"]), &json!("Active"))
    );
    let ended = http.delete("/api/v1/namespaces/n").await.json();
    assert_eq!(ended["status"]["phase"], "Terminating");
    let (code, _, message) = http.post("/api/v1/namespaces/n/configmaps", &config_map("a")).await.failure();
    assert_eq!(code, 403);
    assert!(message.contains("because it is being terminated"), "{message}");
    let mut finalized = http.get("/api/v1/namespaces/n").await.json();
    finalized["spec"]["finalizers"] = json!([]);
    let answer = http.put("/api/v1/namespaces/n/finalize", &finalized).await;
    assert_eq!(answer.code, 200, "{}", answer.text);
    assert_eq!(http.get("/api/v1/namespaces/n").await.code, 404);
    assert_eq!(
        http.delete("/api/v1/namespaces/default").await.failure(),
        (
            403,
            "Forbidden".into(),
            "namespaces \"default\" is forbidden: this namespace may not be deleted".into()
        )
    );
    assert_eq!(
        http.post("/api/v1/namespaces/none/configmaps", &config_map("a")).await.failure(),
        (404, "NotFound".into(), "namespaces \"none\" not found".into())
    );
    cluster.stop().await;
}

#[tokio::test]
async fn services_get_addresses_and_ports_and_give_them_back() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let services = "/api/v1/namespaces/default/services";
    let kubernetes = http.get(&format!("{services}/kubernetes")).await.json();
    assert_eq!(kubernetes["spec"]["clusterIP"], "10.43.0.1");
    let service = |name: &str, spec: Value| {
        let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}});
        for (key, value) in spec.as_object().unwrap() {
            service["spec"][key] = value.clone();
        }
        service
    };
    let a = http.create(services, &service("a", json!({"type": "NodePort"}))).await;
    let address = a["spec"]["clusterIP"].as_str().unwrap().to_owned();
    let port = a["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    assert!(address.starts_with("10.43.") && (30000..=32767).contains(&port));
    assert_eq!((&a["spec"]["clusterIPs"], &a["spec"]["ipFamilies"]), (&json!([address]), &json!(["IPv4"])));
    let taken = http.post(services, &service("b", json!({"clusterIP": address}))).await.failure();
    assert_eq!(taken.0, 422);
    assert!(taken.2.contains("provided IP is already allocated"), "{}", taken.2);
    let ports = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
    let taken = http.post(services, &service("b", ports.clone())).await.failure();
    assert!(taken.0 == 422 && taken.2.contains("provided port is already allocated"), "{}", taken.2);
    let outside = http.post(services, &service("b", json!({"clusterIP": "1.2.3.4"}))).await.failure();
    assert!(
        outside.0 == 422 && outside.2.contains("the provided network does not match the current range"),
        "{}",
        outside.2
    );
    // A change of type gives the port back, a deletion the address.
    let answer = http.merge(&format!("{services}/a"), &json!({"spec": {"type": "ClusterIP"}})).await;
    assert_eq!(answer.code, 200, "{}", answer.text);
    assert!(answer.json()["spec"]["ports"][0]["nodePort"].is_null());
    http.create(services, &service("b", ports)).await;
    http.delete(&format!("{services}/a")).await;
    http.create(services, &service("c", json!({"clusterIP": address}))).await;
    let headless = http.create(services, &service("d", json!({"clusterIP": "None"}))).await;
    assert_eq!(headless["spec"]["clusterIP"], "None");
    let ips = http.get("/apis/networking.k8s.io/v1/ipaddresses").await.json();
    assert_eq!(ips["items"].as_array().unwrap().len(), 3, "{ips}");
    cluster.stop().await;
}
