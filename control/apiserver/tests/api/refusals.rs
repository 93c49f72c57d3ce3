//! Owns bad input: each is refused with upstream's status and reason, and nothing changes.

use crate::support::{Answer, Cluster, Http};
use serde_json::{Value, json};

const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";

fn deployment(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": {
        "replicas": 2, "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
        "spec": {"containers": [{"name": "c", "image": "i"}]}}}})
}

async fn everything(http: &Http) -> Value {
    let mut all = Vec::new();
    for path in [CONFIG_MAPS, DEPLOYMENTS, "/api/v1/namespaces/default/services"] {
        all.push(http.get(path).await.json()["items"].clone());
    }
    json!(all)
}

fn row(answer: &Answer) -> (u16, String) {
    let (code, reason, _) = answer.failure();
    (code, reason)
}

#[tokio::test]
async fn bad_bodies() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    http.create(DEPLOYMENTS, &deployment("good")).await;
    http.create(CONFIG_MAPS, &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "good"}}))
        .await;
    let before = everything(&http).await;
    let json_type = [("content-type", "application/json")];
    let yaml_type = [("content-type", "application/yaml")];
    let changed = |pointer: &str, value: Value| {
        let mut one = deployment("bad");
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        one.pointer_mut(parent).unwrap()[key] = value;
        one.to_string()
    };
    let strict = format!("{DEPLOYMENTS}?fieldValidation=Strict");
    let huge = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "huge"},
        "data": {"a": "x".repeat(3 << 20)}});
    let rows: Vec<(&str, Answer, (u16, &str))> = vec![
        ("unknown field", http.send("POST", &strict, &json_type, &changed("/spec/repliicas", json!(1))).await, (400, "BadRequest")),
        ("wrong type", http.send("POST", DEPLOYMENTS, &json_type, &changed("/spec/replicas", json!("two"))).await, (400, "BadRequest")),
        ("missing name", http.send("POST", DEPLOYMENTS, &json_type, &changed("/metadata/name", Value::Null)).await, (422, "Invalid")),
        ("invalid label", http.send("POST", DEPLOYMENTS, &json_type, &changed("/metadata/labels", json!({"a b": "c"}))).await, (422, "Invalid")),
        ("selector", http.send("POST", DEPLOYMENTS, &json_type, &changed("/spec/selector/matchLabels", json!({"x": "y"}))).await, (422, "Invalid")),
        ("unknown resource", http.get("/api/v1/namespaces/default/widgets").await, (404, "NotFound")),
        ("unknown version", http.get("/apis/apps/v9/namespaces/default/deployments").await, (404, "NotFound")),
        ("another kind", http.send("POST", CONFIG_MAPS, &json_type, &deployment("bad").to_string()).await, (400, "BadRequest")),
        ("broken JSON", http.send("POST", CONFIG_MAPS, &json_type, "{\"kind\": ").await, (400, "BadRequest")),
        ("broken YAML", http.send("POST", CONFIG_MAPS, &yaml_type, "kind: [a\nb: }").await, (400, "BadRequest")),
        ("over the limit", http.send("POST", CONFIG_MAPS, &json_type, &huge.to_string()).await, (413, "RequestEntityTooLarge")),
        ("media type", http.send("POST", CONFIG_MAPS, &[("content-type", "text/plain")], "x").await, (415, "UnsupportedMediaType")),
        ("apply patch", http.send("PATCH", &format!("{CONFIG_MAPS}/good"), &[("content-type", "application/apply-patch+yaml")], "x").await, (415, "UnsupportedMediaType")),
        ("broken patch", http.send("PATCH", &format!("{CONFIG_MAPS}/good"), &[("content-type", "application/merge-patch+json")], "{").await, (400, "BadRequest")),
        ("other namespace", http.post(CONFIG_MAPS, &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "kube-system"}})).await, (400, "BadRequest")),
        ("other name", http.put(&format!("{CONFIG_MAPS}/good"), &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other"}})).await, (400, "BadRequest")),
        ("immutable", http.merge(&format!("{DEPLOYMENTS}/good"), &json!({"spec": {"selector": {"matchLabels": {"a": "b", "c": "d"}}, "template": {"metadata": {"labels": {"c": "d"}}}}})).await, (422, "Invalid")),
        ("stale", http.merge(&format!("{CONFIG_MAPS}/good"), &json!({"metadata": {"resourceVersion": "1"}, "data": {"a": "b"}})).await, (409, "Conflict")),
        ("method", http.send("PUT", CONFIG_MAPS, &json_type, "{}").await, (405, "MethodNotAllowed")),
        ("dry run", http.send("POST", &format!("{CONFIG_MAPS}?dryRun=Some"), &json_type, "{}").await, (400, "BadRequest")),
        ("not there", http.merge(&format!("{CONFIG_MAPS}/none"), &json!({})).await, (404, "NotFound")),
    ];
    for (name, answer, (code, reason)) in rows {
        assert_eq!(row(&answer), (code, reason.to_owned()), "{name}: {}", answer.text);
    }
    assert_eq!(everything(&http).await, before);
    let answer = http.send("POST", DEPLOYMENTS, &json_type, &changed("/spec/repliicas", json!(1))).await;
    assert_eq!(answer.code, 201);
    let warning = answer.headers.get("warning").map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(warning.as_deref(), Some("299 - \"unknown field \\\"spec.repliicas\\\"\""));
    cluster.stop().await;
}
