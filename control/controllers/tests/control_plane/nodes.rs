//! Nodes: pod ranges, readiness, loss.

use crate::support::{Plane, deployment, eventually};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_get_ranges_and_lose_the_taint_once_ready() {
    let plane = Plane::start(3, Duration::from_secs(40)).await;
    let nodes: Api<Node> = Api::all(plane.admin.clone());
    let ranges = eventually("ranges and no taints", || async {
        let all = nodes.list(&ListParams::default()).await.unwrap().items;
        let specs = all.into_iter().map(|n| n.spec.unwrap_or_default());
        let specs: Vec<_> = specs.filter(|s| s.taints.as_deref().unwrap_or_default().is_empty()).collect();
        assert!(
            specs.iter().all(|s| s.pod_cidr.as_ref() == s.pod_cidrs.iter().flatten().next()),
            "{specs:?}"
        );
        let ranges: BTreeSet<_> = specs.into_iter().filter_map(|s| s.pod_cidrs).collect();
        (ranges.len() == 3).then_some(ranges)
    })
    .await;
    let expected = [
        ["10.42.0.0/24", "fd42::/64"],
        ["10.42.1.0/24", "fd42:0:0:1::/64"],
        ["10.42.2.0/24", "fd42:0:0:2::/64"],
    ];
    // Which node gets which is a matter of order; the families of one node need not be of one number.
    let (v4, v6): (BTreeSet<_>, BTreeSet<_>) =
        ranges.iter().map(|pair| (pair[0].as_str(), pair[1].as_str())).unzip();
    assert_eq!((v4, v6), expected.iter().map(|[a, b]| (*a, *b)).unzip());
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_loses_its_pods_and_gets_back_to_work() {
    let plane = Plane::start(2, Duration::from_secs(2)).await;
    let mut web = deployment("web", 4, "one");
    let leave =
        |key| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0});
    web["spec"]["template"]["spec"]["tolerations"] =
        json!([leave("node.kubernetes.io/unreachable"), leave("node.kubernetes.io/not-ready")]);
    plane.create::<Deployment>(web).await;
    let on = |node: &'static str| {
        let plane = &plane;
        async move {
            let pods = plane.pods("web").await;
            pods.iter().filter(|p| p.spec.as_ref().unwrap().node_name.as_deref() == Some(node)).count()
        }
    };
    eventually("two pods on each", || async {
        ((on("node-0").await, on("node-1").await) == (2, 2)).then_some(())
    })
    .await;
    plane.silent.lock().insert("node-1".into());
    eventually("all pods on the node that is left", || async { (on("node-0").await == 4).then_some(()) })
        .await;
    let nodes: Api<Node> = Api::all(plane.admin.clone());
    let node = nodes.get("node-1").await.unwrap();
    let conditions = node.status.unwrap().conditions.unwrap();
    let ready = conditions.iter().find(|c| c.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("Unknown", Some("NodeStatusUnknown")));
    let taints: BTreeSet<_> =
        node.spec.unwrap().taints.unwrap().into_iter().map(|t| format!("{}:{}", t.key, t.effect)).collect();
    assert!(taints.contains("node.kubernetes.io/unreachable:NoExecute"), "{taints:?}");

    plane.silent.lock().clear();
    let back =
        json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}});
    let back = &Patch::Strategic(back);
    eventually("the node is free of taints", || async {
        // As a kubelet does: its status is reported again and again.
        nodes.patch_status("node-1", &PatchParams::default(), back).await.unwrap();
        let spec = nodes.get("node-1").await.unwrap().spec?;
        spec.taints.unwrap_or_default().is_empty().then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_node_that_falls_silent_keeps_its_pods() {
    let plane = Plane::start(1, Duration::from_secs(2)).await;
    plane.create::<Deployment>(deployment("web", 1, "one")).await;
    let is = |wanted: &'static str| {
        let plane = &plane;
        async move {
            let pods = plane.pods("web").await;
            let conditions = pods.first()?.status.as_ref()?.conditions.clone()?;
            conditions.iter().any(|c| c.type_ == "Ready" && c.status == wanted).then_some(())
        }
    };
    eventually("a ready pod", || is("True")).await;
    plane.silent.lock().insert("node-0".into());
    let nodes: Api<Node> = Api::all(plane.admin.clone());
    let taints = eventually("the node is unreachable", || async {
        let taints = nodes.get("node-0").await.unwrap().spec?.taints?;
        taints.iter().any(|t| t.key == "node.kubernetes.io/unreachable").then_some(taints)
    })
    .await;
    assert!(taints.iter().all(|t| t.effect == "NoSchedule"), "{taints:?}");
    eventually("its pod leaves the Services", || is("False")).await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_pod_that_never_ran_is_gone_at_once() {
    let plane = Plane::start(0, Duration::from_secs(40)).await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "main", "image": "one"}]}});
    plane.create::<Pod>(pod).await;
    plane.api::<Pod>().delete("p", &DeleteParams::default()).await.unwrap();
    eventually("the pod is gone", || async {
        plane.api::<Pod>().get_opt("p").await.unwrap().is_none().then_some(())
    })
    .await;
    plane.stop().await;
}
