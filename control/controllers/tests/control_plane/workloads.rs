//! Deployments, ReplicaSets, scheduling and endpoints, together.

use crate::support::{Plane, deployment, eventually};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const GRACE: Duration = Duration::from_secs(40);

async fn rolled_out(plane: &Plane, name: &str, replicas: i32) -> Deployment {
    eventually(&format!("{name} has {replicas} available"), || async move {
        let d = plane.api::<Deployment>().get(name).await.unwrap();
        let status = d.status.clone().unwrap_or_default();
        let all = [status.replicas, status.updated_replicas, status.available_replicas];
        let current = status.observed_generation == d.metadata.generation;
        (current && all.iter().all(|n| n.unwrap_or(0) == replicas)).then_some(d)
    })
    .await
}

async fn patch(plane: &Plane, name: &str, patch: serde_json::Value) {
    let patch = Patch::Strategic(patch);
    plane.api::<Deployment>().patch(name, &PatchParams::default(), &patch).await.unwrap();
}

fn progressing(d: &Deployment) -> (String, String) {
    let conditions = d.status.as_ref().unwrap().conditions.clone().unwrap();
    let c = conditions.into_iter().find(|c| c.type_ == "Progressing").unwrap();
    (c.status, c.reason.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_comes_up_rolls_goes_back_and_scales() {
    let plane = Plane::start(3, GRACE).await;
    plane.create::<Deployment>(deployment("web", 3, "one")).await;
    let d = rolled_out(&plane, "web", 3).await;
    assert_eq!(d.annotations()["deployment.kubernetes.io/revision"], "1");
    eventually("the rollout is over", || async {
        let d = plane.api::<Deployment>().get("web").await.unwrap();
        (progressing(&d) == ("True".into(), "NewReplicaSetAvailable".into())).then_some(())
    })
    .await;
    let nodes: BTreeMap<_, _> =
        plane.pods("web").await.into_iter().map(|p| (p.spec.unwrap().node_name.unwrap(), ())).collect();
    assert_eq!(nodes.len(), 3, "one pod per node");

    let image =
        |image| json!({"spec": {"template": {"spec": {"containers": [{"name": "main", "image": image}]}}}});
    patch(&plane, "web", image("two")).await;
    let d = rolled_out(&plane, "web", 3).await;
    assert_eq!(d.annotations()["deployment.kubernetes.io/revision"], "2");
    patch(&plane, "web", image("one")).await;
    let d = rolled_out(&plane, "web", 3).await;
    assert_eq!(d.annotations()["deployment.kubernetes.io/revision"], "3");
    let sets = plane.api::<ReplicaSet>().list(&ListParams::default()).await.unwrap();
    assert_eq!(sets.items.len(), 2, "the old template's ReplicaSet is used again");

    patch(&plane, "web", json!({"spec": {"replicas": 1}})).await;
    rolled_out(&plane, "web", 1).await;
    let events = eventually("scaling events", || async {
        let events = plane.events("ScalingReplicaSet").await;
        (events.len() > 4).then_some(events)
    })
    .await;
    assert!(events.iter().any(|e| e.starts_with("Scaled up replica set web-") && e.ends_with("from 0 to 3")));
    assert!(events.iter().any(|e| e.ends_with("from 3 to 1")), "{events:?}");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_pods_come_up_quickly_and_exactly_once() {
    let plane = Plane::start(3, GRACE).await;
    plane.create::<Deployment>(deployment("web", 1, "one")).await;
    rolled_out(&plane, "web", 1).await;
    let start = Instant::now();
    patch(&plane, "web", json!({"spec": {"replicas": 50}})).await;
    rolled_out(&plane, "web", 50).await;
    println!("1 to 50 replicas in {:?}", start.elapsed());
    let pods = plane.pods("web").await;
    assert_eq!(pods.len(), 50);
    let mut per_node: BTreeMap<String, usize> = BTreeMap::new();
    for pod in &pods {
        *per_node.entry(pod.spec.as_ref().unwrap().node_name.clone().unwrap()).or_default() += 1;
    }
    assert!(per_node.values().all(|n| (15..=18).contains(n)), "spread evenly: {per_node:?}");
    let all = plane.api::<Pod>().list(&ListParams::default()).await.unwrap();
    assert_eq!(all.items.len(), 50, "none was created in excess");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_follow_the_pods() {
    let plane = Plane::start(2, GRACE).await;
    let service = json!({"metadata": {"name": "web", "labels": {"tier": "front"}}, "spec": {
        "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "www"}]}});
    plane.create::<Service>(service).await;
    plane.create::<Deployment>(deployment("web", 3, "one")).await;
    let ready = |want: usize| {
        let plane = &plane;
        eventually("ready endpoints", move || async move {
            let by_service = ListParams::default().labels("kubernetes.io/service-name=web");
            let slices = plane.api::<EndpointSlice>().list(&by_service).await.unwrap().items;
            let all = slices.iter().flat_map(|s| s.endpoints.iter().flatten());
            let count = all.filter(|e| e.conditions.as_ref().is_some_and(|c| c.ready == Some(true))).count();
            (count == want && slices.len() == 1).then(|| slices[0].clone())
        })
    };
    let slice = ready(3).await;
    assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
    assert_eq!(slice.labels()["tier"], "front");
    assert!(slice.endpoints.as_ref().unwrap()[0].node_name.is_some());
    eventually("legacy endpoints", || async {
        let endpoints = plane.api::<Endpoints>().get_opt("web").await.unwrap()?;
        let subset = endpoints.subsets.as_ref()?.first()?;
        (subset.addresses.as_ref()?.len() == 3).then_some(())
    })
    .await;
    patch(&plane, "web", json!({"spec": {"replicas": 0}})).await;
    ready(0).await;
    patch(&plane, "web", json!({"spec": {"replicas": 2}})).await;
    ready(2).await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_fits_nowhere_says_why_and_is_placed_when_there_is_room() {
    let mut plane = Plane::start(2, GRACE).await;
    let pod = json!({"metadata": {"name": "big", "labels": {"app": "big"}}, "spec": {"containers": [
        {"name": "main", "image": "one", "resources": {"requests": {"cpu": "5"}}}]}});
    plane.create::<Pod>(pod).await;
    let message = eventually("the condition", || async {
        let pod = plane.api::<Pod>().get("big").await.unwrap();
        let conditions = pod.status?.conditions?;
        let c = conditions.into_iter().find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
        c.message.filter(|m| m.contains("0/2"))
    })
    .await;
    assert_eq!(
        message,
        "0/2 nodes are available: 2 Insufficient cpu. preemption: 0/2 nodes are available: \
         2 Preemption is not helpful for scheduling."
    );
    eventually("the event", || async {
        plane.events("FailedScheduling").await.contains(&message).then_some(())
    })
    .await;
    plane.add_node("roomy", "8", GRACE).await;
    eventually("the pod is bound", || async {
        let pod = plane.api::<Pod>().get("big").await.unwrap();
        (pod.spec?.node_name? == "roomy").then_some(())
    })
    .await;
    eventually("the event", || async {
        let wanted = "Successfully assigned default/big to roomy".to_owned();
        plane.events("Scheduled").await.contains(&wanted).then_some(())
    })
    .await;
    plane.stop().await;
}
