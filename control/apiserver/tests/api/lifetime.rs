//! Owns what outlives a server, and what doesn't.

use crate::support::Cluster;
use serde_json::json;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_everything() {
    let cluster = Cluster::start().await;
    let http = cluster.admin();
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"},
        "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
    let made = http.create("/api/v1/namespaces/default/services", &service).await;
    let role = "/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node-proxier";
    let before = http.get(role).await.json();
    let view = "/apis/rbac.authorization.k8s.io/v1/clusterroles/view";
    let deadline = Instant::now() + Duration::from_secs(5);
    while http.get(view).await.json()["rules"].as_array().is_none_or(Vec::is_empty) {
        assert!(Instant::now() < deadline, "the role wasn't aggregated");
        tokio::task::yield_now().await;
    }
    drop(http);
    let dir = cluster.stop().await;
    let again =
        Cluster::start_with(dir, |config| config.advertise_address = "192.0.2.11".parse().unwrap()).await;
    let http = again.admin();
    assert_eq!(http.get("/api/v1/namespaces/default/services/a").await.json(), made);
    assert_eq!(http.get(role).await.json(), before);
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes";
    assert_eq!(http.get(slices).await.json()["endpoints"][0]["addresses"][0], "192.0.2.11");
    // What was given before the restart is still taken.
    let port = made["spec"]["ports"][0]["nodePort"].clone();
    let other = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"},
        "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]}});
    assert_eq!(http.post("/api/v1/namespaces/default/services", &other).await.code, 422);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_expire() {
    let adapt = |config: &mut weft_control_apiserver::Config| {
        config.event_ttl = Duration::from_secs(1);
        config.compaction_interval = Duration::from_secs(1);
    };
    let cluster = Cluster::start_with(tempfile::tempdir().unwrap(), adapt).await;
    let http = cluster.admin();
    let events = "/api/v1/namespaces/default/events";
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}, "reason": "R",
        "involvedObject": {"kind": "Pod", "namespace": "default", "name": "p"}, "type": "Normal"});
    http.create(events, &event).await;
    let other = http.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await.json();
    assert_eq!(
        (&other["regarding"]["name"], &other["apiVersion"]),
        (&json!("p"), &json!("events.k8s.io/v1"))
    );
    let deadline = Instant::now() + Duration::from_secs(10);
    while http.get(&format!("{events}/e")).await.code != 404 {
        assert!(Instant::now() < deadline, "the event didn't expire");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // By now the start is compacted away: a page of back then is gone.
    let old = http.get("/api/v1/namespaces?resourceVersion=3&resourceVersionMatch=Exact").await;
    assert_eq!(old.failure().0, 410, "{}", old.text);
    cluster.stop().await;
}
