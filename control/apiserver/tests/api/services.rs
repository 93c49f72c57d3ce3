//! Owns Services: families, cluster IPs and their ranges, node ports, what a change of type gives back.

use crate::support::{Answer, Cluster, Http};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const SERVICES: &str = "/api/v1/namespaces/default/services";
const CIDRS: &str = "/apis/networking.k8s.io/v1/servicecidrs";
const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";

async fn cluster(ranges: &[&str]) -> Cluster {
    on(tempfile::tempdir().unwrap(), ranges).await
}

async fn on(dir: tempfile::TempDir, ranges: &[&str]) -> Cluster {
    let ranges = ranges.iter().map(|range| range.parse().unwrap()).collect();
    Cluster::start_with(dir, |config| config.service_cidrs = ranges).await
}

fn service(name: &str, spec: Value) -> Value {
    let mut service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"ports": [{"port": 80}], "selector": {"a": "b"}}});
    for (key, value) in spec.as_object().unwrap() {
        service["spec"][key] = value.clone();
    }
    service
}

async fn change(http: &Http, name: &str, spec: Value) -> Answer {
    http.merge(&format!("{SERVICES}/{name}"), &json!({"spec": spec})).await
}

async fn changed(http: &Http, name: &str, spec: Value) -> Value {
    let answer = change(http, name, spec).await;
    assert_eq!(answer.code, 200, "{}", answer.text);
    answer.json()["spec"].clone()
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|one| one.as_str().unwrap().to_owned()).collect()
}

async fn items(http: &Http, path: &str) -> Vec<Value> {
    http.get(path).await.json()["items"].as_array().unwrap().clone()
}

/// Each address of a Service once, and as an IPAddress of that Service; no IPAddress besides.
async fn assert_consistent(http: &Http) {
    let mut used: Vec<(String, Value)> = Vec::new();
    for service in items(http, "/api/v1/services").await {
        let addresses = strings(&service["spec"]["clusterIPs"]);
        let owner = json!([service["metadata"]["namespace"], service["metadata"]["name"]]);
        used.extend(addresses.into_iter().filter(|one| one != "None").map(|one| (one, owner.clone())));
    }
    let mut known: Vec<(String, Value)> = Vec::new();
    for address in items(http, ADDRESSES).await {
        let parent = &address["spec"]["parentRef"];
        assert_eq!(parent["resource"], "services");
        let name = address["metadata"]["name"].as_str().unwrap().to_owned();
        known.push((name, json!([parent["namespace"], parent["name"]])));
    }
    used.sort_by(|one, other| one.0.cmp(&other.0));
    known.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(used, known);
    assert_eq!(used.iter().map(|(address, _)| address).collect::<BTreeSet<_>>().len(), used.len());
}

#[tokio::test]
async fn a_service_gets_its_families_and_changes_them_live() {
    let cluster = cluster(&["10.43.0.0/24", "fd43::/112"]).await;
    let http = cluster.admin();
    assert_eq!(items(&http, CIDRS).await[0]["spec"]["cidrs"], json!(["10.43.0.0/24", "fd43::/112"]));
    let one = http.create(SERVICES, &service("one", json!({}))).await["spec"].clone();
    assert_eq!((&one["ipFamilyPolicy"], &one["ipFamilies"]), (&json!("SingleStack"), &json!(["IPv4"])));
    let two = changed(&http, "one", json!({"ipFamilyPolicy": "PreferDualStack"})).await;
    assert_eq!(two["ipFamilies"], json!(["IPv4", "IPv6"]));
    let addresses = strings(&two["clusterIPs"]);
    assert_eq!((addresses[0].as_str(), addresses.len()), (one["clusterIP"].as_str().unwrap(), 2));
    assert!(addresses[1].starts_with("fd43::"), "{addresses:?}");
    assert_consistent(&http).await;
    let refused = change(&http, "one", json!({"clusterIPs": [addresses[0]], "ipFamilies": ["IPv4"]})).await;
    let (code, _, message) = refused.failure();
    assert_eq!(code, 422);
    assert!(message.contains("must be 'SingleStack' to release the secondary cluster IP"), "{message}");
    let back = changed(&http, "one", json!({"ipFamilyPolicy": "SingleStack"})).await;
    assert_eq!((&back["clusterIPs"], &back["ipFamilies"]), (&json!([addresses[0]]), &json!(["IPv4"])));
    assert_consistent(&http).await;
    let six = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]});
    let six = http.create(SERVICES, &service("six", six)).await["spec"].clone();
    assert!(strings(&six["clusterIPs"])[0].contains(':') && six["clusterIP"] == six["clusterIPs"][0]);
    let asked = json!({"clusterIP": "fd43::77", "clusterIPs": ["fd43::77", "10.43.0.77"], "ipFamilyPolicy": "PreferDualStack"});
    let asked = http.create(SERVICES, &service("asked", asked)).await["spec"].clone();
    assert_eq!(asked["ipFamilies"], json!(["IPv6", "IPv4"]));
    let refused =
        change(&http, "asked", json!({"clusterIP": "fd43::78", "clusterIPs": ["fd43::78", "10.43.0.77"]}))
            .await;
    assert!(refused.code == 422 && refused.text.contains("may not change once set"), "{}", refused.text);
    let open = service("open", json!({"clusterIP": "None", "selector": null}));
    let open = http.create(SERVICES, &open).await["spec"].clone();
    assert_eq!(
        (&open["ipFamilyPolicy"], &open["ipFamilies"]),
        (&json!("RequireDualStack"), &json!(["IPv4", "IPv6"]))
    );
    assert_consistent(&http).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_cluster_of_one_family_says_so() {
    let dir = {
        let cluster = cluster(&["10.43.0.0/24"]).await;
        let http = cluster.admin();
        for (spec, expected) in [
            (
                json!({"ipFamilyPolicy": "RequireDualStack"}),
                "this cluster is not configured for dual-stack services",
            ),
            (
                json!({"ipFamilies": ["IPv6"]}),
                "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
            ),
            (json!({"clusterIP": "fd43::1"}), "IPv6 is not configured on this cluster"),
        ] {
            let answer = http.post(SERVICES, &service("a", spec)).await;
            assert!(
                answer.code == 422 && answer.text.replace("\\\"", "\"").contains(expected),
                "{}",
                answer.text
            );
        }
        let content =
            http.create(SERVICES, &service("a", json!({"ipFamilyPolicy": "PreferDualStack"}))).await;
        assert_eq!(content["spec"]["ipFamilies"], json!(["IPv4"]));
        cluster.stop().await
    };
    // A second family comes: the range grows, Services stay until somebody says otherwise.
    let cluster = on(dir, &["10.43.0.0/24", "fd43::/112"]).await;
    let http = cluster.admin();
    assert_eq!(items(&http, CIDRS).await[0]["spec"]["cidrs"], json!(["10.43.0.0/24", "fd43::/112"]));
    let answer = http.merge(&format!("{SERVICES}/a"), &json!({"metadata": {"labels": {"x": "y"}}})).await;
    assert_eq!(answer.json()["spec"]["ipFamilies"], json!(["IPv4"]));
    let both = changed(&http, "a", json!({"ipFamilyPolicy": "RequireDualStack"})).await;
    assert_eq!(strings(&both["clusterIPs"]).len(), 2);
    assert_consistent(&http).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_an_address_twice_and_ranges_grow_live() {
    // 62 addresses, one of them the API's own.
    let cluster = cluster(&["10.43.0.0/26"]).await;
    let made = futures_of(&cluster, 0..61).await;
    assert!(
        made.iter().all(|answer| answer.code == 201),
        "{:?}",
        made.iter().map(|a| a.code).collect::<Vec<_>>()
    );
    let http = cluster.admin();
    assert_consistent(&http).await;
    let full = http.post(SERVICES, &service("full", json!({}))).await;
    assert_eq!(
        full.failure(),
        (
            500,
            "InternalError".into(),
            "Internal error occurred: failed to allocate a serviceIP: range is full".into()
        )
    );
    let more = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
        "spec": {"cidrs": ["10.99.0.0/28"]}});
    http.create(CIDRS, &more).await;
    let asked = http.create(SERVICES, &service("asked", json!({"clusterIP": "10.99.0.14"}))).await;
    assert_eq!(asked["spec"]["clusterIP"], "10.99.0.14");
    let grown = http.create(SERVICES, &service("grown", json!({}))).await;
    assert!(grown["spec"]["clusterIP"].as_str().unwrap().starts_with("10.99.0."), "{grown}");
    for edge in ["10.99.0.0", "10.99.0.15", "10.98.0.1"] {
        let answer = http.post(SERVICES, &service("edge", json!({"clusterIP": edge}))).await;
        let expected =
            format!("failed to allocate IP {edge}: the provided network does not match the current range");
        assert!(answer.code == 422 && answer.text.contains(&expected), "{}", answer.text);
    }
    // A range that isn't ready, or is on its way out, gives nothing any more.
    let condition = json!({"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "Terminating",
        "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    assert_eq!(http.merge(&format!("{CIDRS}/more/status"), &condition).await.code, 200);
    assert_eq!(http.post(SERVICES, &service("late", json!({}))).await.code, 500);
    let metrics = http.get("/metrics").await.text;
    for line in [
        "kube_apiserver_clusterip_allocator_allocated_ips{cidr=\"10.43.0.0/26\"} 62",
        "kube_apiserver_clusterip_allocator_available_ips{cidr=\"10.43.0.0/26\"} 0",
        "kube_apiserver_clusterip_allocator_allocated_ips{cidr=\"10.99.0.0/28\"} 2",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    // What is deleted is free at once.
    http.delete(&format!("{SERVICES}/s7")).await;
    http.create(SERVICES, &service("late", json!({}))).await;
    assert_consistent(&http).await;
    cluster.stop().await;
}

async fn futures_of(cluster: &Cluster, numbers: std::ops::Range<usize>) -> Vec<Answer> {
    let mut tasks = tokio::task::JoinSet::new();
    for number in numbers {
        let http = cluster.admin();
        tasks.spawn(async move { http.post(SERVICES, &service(&format!("s{number}"), json!({}))).await });
    }
    tasks.join_all().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_dies_leaves_whole_allocations() {
    let mut cluster = cluster(&["10.43.0.0/24"]).await;
    for round in 0..3 {
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let http = cluster.admin();
                tokio::spawn(async move {
                    for number in 0.. {
                        let name = format!("r{round}-{writer}-{number}");
                        let kind = json!({"type": "NodePort", "ipFamilyPolicy": "PreferDualStack"});
                        if http.post(SERVICES, &service(&name, kind)).await.code != 201 || number == 6 {
                            return;
                        }
                    }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        for writer in writers.iter().skip(round) {
            writer.abort();
        }
        for writer in writers {
            let _aborted = writer.await;
        }
        let dir = cluster.stop().await;
        cluster = on(dir, &["10.43.0.0/24"]).await;
        assert_consistent(&cluster.admin()).await;
    }
    cluster.stop().await;
}

/// Waits until the server's own loop has seen what is expected.
async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while !check().await {
        assert!(tokio::time::Instant::now() < deadline, "not seen: {what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocations_are_repaired() {
    let cluster = cluster(&["10.43.0.0/24"]).await;
    let http = cluster.admin();
    let made = http.create(SERVICES, &service("a", json!({}))).await;
    let address = made["spec"]["clusterIP"].as_str().unwrap().to_owned();
    let path = format!("{ADDRESSES}/{address}");
    let first = http.get(&path).await.json();
    assert_eq!(first["metadata"]["labels"]["ipaddress.kubernetes.io/managed-by"], "ipallocator.k8s.io");
    assert_eq!(first["metadata"]["labels"]["ipaddress.kubernetes.io/ip-family"], "IPv4");
    http.delete(&path).await;
    until("the address is allocated again", async || http.get(&path).await.code == 200).await;
    assert_ne!(http.get(&path).await.json()["metadata"]["uid"], first["metadata"]["uid"]);
    let events = async || items(&http, "/api/v1/namespaces/default/events").await;
    until("an Event tells of it", async || {
        let message = format!("Cluster IP [IPv4]: {address} is not allocated; repairing");
        events()
            .await
            .iter()
            .any(|e| e["reason"] == "ClusterIPNotAllocated" && e["message"] == message.as_str())
    })
    .await;
    // One that says that it is the allocator's, and isn't of any Service, goes; anybody else's stays.
    let stray = |name: &str, managed: bool| {
        let labels = if managed {
            json!({"ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"})
        } else {
            json!({})
        };
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "IPAddress", "metadata": {"name": name, "labels": labels},
            "spec": {"parentRef": {"resource": "services", "namespace": "default", "name": "none"}}})
    };
    http.create(ADDRESSES, &stray("10.43.0.200", true)).await;
    http.create(ADDRESSES, &stray("10.43.0.201", false)).await;
    until("the stray address is gone", async || {
        http.get(&format!("{ADDRESSES}/10.43.0.200")).await.code == 404
    })
    .await;
    let reserved = http.post(SERVICES, &service("b", json!({"clusterIP": "10.43.0.201"}))).await;
    assert!(
        reserved.code == 422 && reserved.text.contains("provided IP is already allocated"),
        "{}",
        reserved.text
    );
    cluster.stop().await;
}

#[tokio::test]
async fn node_ports_come_and_go_with_the_type() {
    let cluster = cluster(&["10.43.0.0/24"]).await;
    let http = cluster.admin();
    let dns = json!({"type": "NodePort", "ports": [
        {"name": "udp", "port": 53, "protocol": "UDP"}, {"name": "tcp", "port": 53, "protocol": "TCP"}, {"name": "m", "port": 9153}]});
    let dns = http.create(SERVICES, &service("dns", dns)).await["spec"]["ports"].clone();
    assert_eq!(dns[0]["nodePort"], dns[1]["nodePort"], "one node port for both protocols");
    assert_ne!(dns[0]["nodePort"], dns[2]["nodePort"]);
    let balancer = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "loadBalancerClass": "example.com/lb"});
    let made = http.create(SERVICES, &service("lb", balancer)).await["spec"].clone();
    let (port, check) =
        (made["ports"][0]["nodePort"].as_u64().unwrap(), made["healthCheckNodePort"].as_u64().unwrap());
    assert!(port >= 30086 && check >= 30086 && port != check, "{made}");
    assert_eq!(made["allocateLoadBalancerNodePorts"], true);
    let refused = change(&http, "lb", json!({"loadBalancerClass": "example.com/other"})).await;
    assert!(
        refused.text.contains(
            "spec.loadBalancerClass: Invalid value: \\\"example.com/other\\\": may not change once set"
        ),
        "{}",
        refused.text
    );
    let refused = change(&http, "lb", json!({"healthCheckNodePort": 30001})).await;
    assert!(
        refused.text.contains("spec.healthCheckNodePort") && refused.text.contains("field is immutable"),
        "{}",
        refused.text
    );
    // A manifest that never knew of ports and addresses keeps them.
    let plain = service(
        "lb",
        json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "loadBalancerClass": "example.com/lb"}),
    );
    let same = http.put(&format!("{SERVICES}/lb"), &plain).await.json()["spec"].clone();
    assert_eq!(same, made);
    // Other traffic policy: the health check's port goes, and may be had by others.
    let other = changed(&http, "lb", json!({"externalTrafficPolicy": "Cluster"})).await;
    assert!(other["healthCheckNodePort"].is_null(), "{other}");
    let asked = |name: &str, port: u64| {
        service(name, json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]}))
    };
    http.create(SERVICES, &asked("next", check)).await;
    let refused = http.post(SERVICES, &asked("more", port)).await;
    assert!(
        refused.text.contains("spec.ports[0].nodePort: Invalid value")
            && refused.text.contains("provided port is already allocated"),
        "{}",
        refused.text
    );
    let refused = http.post(SERVICES, &asked("more", 29999)).await;
    assert!(
        refused
            .text
            .contains("provided port is not in the valid range. The range of valid ports is 30000-32767"),
        "{}",
        refused.text
    );
    // Node ports switched off stay until they are taken away one by one.
    let off = changed(&http, "lb", json!({"allocateLoadBalancerNodePorts": false})).await;
    assert_eq!(off["ports"][0]["nodePort"], port);
    let off =
        changed(&http, "lb", json!({"ports": [{"port": 80, "targetPort": 80, "protocol": "TCP"}]})).await;
    assert!(off["ports"][0]["nodePort"].is_null(), "{off}");
    http.create(SERVICES, &asked("more", port)).await;
    cluster.stop().await;
}

#[tokio::test]
async fn an_external_name_has_nothing_of_the_cluster() {
    let cluster = cluster(&["10.43.0.0/24"]).await;
    let http = cluster.admin();
    let made = http.create(SERVICES, &service("dns", json!({"type": "NodePort"}))).await;
    let port = made["spec"]["ports"][0]["nodePort"].clone();
    let name = changed(&http, "dns", json!({"type": "ExternalName", "externalName": "example.com"})).await;
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "externalTrafficPolicy"] {
        assert!(name[field].is_null(), "{field}: {name}");
    }
    assert!(name["ports"][0]["nodePort"].is_null(), "{name}");
    assert_consistent(&http).await;
    let last = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
    http.create(SERVICES, &service("last", last)).await;
    let back = changed(&http, "dns", json!({"type": "ClusterIP", "externalName": null})).await;
    assert!(back["clusterIP"].as_str().unwrap().starts_with("10.43.0."), "{back}");
    assert_consistent(&http).await;
    cluster.stop().await;
}

#[tokio::test]
async fn the_status_is_patched_and_judged() {
    let cluster = cluster(&["10.43.0.0/24"]).await;
    let http = cluster.admin();
    http.create(SERVICES, &service("lb", json!({"type": "LoadBalancer"}))).await;
    http.create(SERVICES, &service("plain", json!({}))).await;
    let status = |ingress: Value| json!({"status": {"loadBalancer": {"ingress": [ingress]}}});
    let path = format!("{SERVICES}/lb/status");
    let patched = http.merge(&path, &status(json!({"ip": "203.0.113.1"}))).await.json();
    assert_eq!(patched["status"]["loadBalancer"]["ingress"], json!([{"ip": "203.0.113.1", "ipMode": "VIP"}]));
    for (ingress, expected) in [
        (json!({"ip": "203.0.113"}), "status.loadBalancer.ingress[0].ip: Invalid value"),
        (json!({"hostname": "203.0.113.1"}), "must be a DNS name, not an IP address"),
        (json!({"hostname": "a.example", "ipMode": "VIP"}), "may not be specified when `ip` is not set"),
        (json!({"ip": "203.0.113.1", "ipMode": "X"}), "Unsupported value"),
    ] {
        let answer = http.merge(&path, &status(ingress)).await;
        assert!(answer.code == 422 && answer.text.contains(expected), "{}", answer.text);
    }
    let answer = http.merge(&format!("{SERVICES}/plain/status"), &status(json!({"ip": "203.0.113.1"}))).await;
    assert!(
        answer.code == 422 && answer.text.contains("may only be used when `spec.type` is"),
        "{}",
        answer.text
    );
    let conditions = json!({"status": {"conditions": [{"type": "StatusPatched", "status": "True", "reason": "Test",
        "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    let patched = http.merge(&format!("{SERVICES}/plain/status"), &conditions).await.json();
    assert_eq!(patched["status"]["conditions"][0]["type"], "StatusPatched");
    // Without a load balancer there is nothing to say about one.
    let answer = change(&http, "lb", json!({"type": "ClusterIP"})).await.json();
    assert_eq!(answer["status"]["loadBalancer"], json!({}));
    cluster.stop().await;
}

#[tokio::test]
async fn ingresses_get_the_default_class() {
    let cluster = cluster(&["10.43.0.0/24"]).await;
    let http = cluster.admin();
    let (classes, ingresses) = (
        "/apis/networking.k8s.io/v1/ingressclasses",
        "/apis/networking.k8s.io/v1/namespaces/default/ingresses",
    );
    let class = |name: &str, default: &str, parameters: Value| {
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "metadata": {"name": name,
            "annotations": {"ingressclass.kubernetes.io/is-default-class": default}},
            "spec": {"controller": "example.com/c", "parameters": parameters}})
    };
    let ingress = |name: &str, class: Value, annotations: Value| {
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": name, "annotations": annotations},
            "spec": {"ingressClassName": class, "defaultBackend": {"service": {"name": "a", "port": {"number": 80}}}}})
    };
    let made = http.create(ingresses, &ingress("before", Value::Null, json!({}))).await;
    assert!(made["spec"]["ingressClassName"].is_null());
    http.create(classes, &class("plain", "false", Value::Null)).await;
    http.create(classes, &class("b", "true", json!({"kind": "K", "name": "n"}))).await;
    let made = http.create(ingresses, &ingress("after", Value::Null, json!({}))).await;
    assert_eq!(made["spec"]["ingressClassName"], "b");
    let made = http.create(ingresses, &ingress("said", json!("plain"), json!({}))).await;
    assert_eq!(made["spec"]["ingressClassName"], "plain");
    let old = json!({"kubernetes.io/ingress.class": "x"});
    let made = http.create(ingresses, &ingress("old", Value::Null, old.clone())).await;
    assert!(made["spec"]["ingressClassName"].is_null());
    let both = http.post(ingresses, &ingress("both", json!("b"), old)).await;
    assert!(both.text.contains("must match `ingressClassName` when both are specified"), "{}", both.text);
    let wrong = json!({"kind": "K", "name": "n", "scope": "Namespace"});
    let wrong = http.post(classes, &class("c", "false", wrong)).await;
    let expected = "spec.parameters.namespace: Required value: `parameters.scope` is set to 'Namespace'";
    assert!(wrong.code == 422 && wrong.text.contains(expected), "{}", wrong.text);
    cluster.stop().await;
}
