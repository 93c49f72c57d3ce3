//! Deletion: background, foreground, orphaning, and whole namespaces; and what new namespaces get.

use crate::support::{Plane, deployment, eventually};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(40);

async fn count<K>(plane: &Plane) -> usize
where
    K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
{
    plane.api::<K>().list(&ListParams::default()).await.unwrap().items.len()
}

async fn up(plane: &Plane, name: &str) {
    plane.create::<Deployment>(deployment(name, 2, "one")).await;
    eventually("two pods", || async { (plane.pods(name).await.len() == 2).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dependents_go_with_their_owner_unless_orphaned() {
    let plane = Plane::start(1, GRACE).await;
    for params in [DeleteParams::background(), DeleteParams::foreground()] {
        up(&plane, "web").await;
        plane.api::<Deployment>().delete("web", &params).await.unwrap();
        eventually("all are gone", || async {
            let left = count::<Deployment>(&plane).await + count::<ReplicaSet>(&plane).await;
            (left + count::<Pod>(&plane).await == 0).then_some(())
        })
        .await;
    }
    up(&plane, "web").await;
    plane.api::<Deployment>().delete("web", &DeleteParams::orphan()).await.unwrap();
    eventually("the deployment is gone", || async { (count::<Deployment>(&plane).await == 0).then_some(()) })
        .await;
    let sets = plane.api::<ReplicaSet>().list(&ListParams::default()).await.unwrap().items;
    assert_eq!(sets.len(), 1);
    assert!(sets[0].metadata.owner_references.as_deref().unwrap_or_default().is_empty());
    assert_eq!(plane.pods("web").await.len(), 2);
    // A new Deployment with the same selector adopts what it finds.
    plane.create::<Deployment>(deployment("web", 2, "one")).await;
    eventually("the replica set is adopted", || async {
        let sets = plane.api::<ReplicaSet>().list(&ListParams::default()).await.unwrap().items;
        (sets.len() == 1 && sets[0].metadata.owner_references.as_ref()?.len() == 1).then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_gets_its_account_and_ca_and_ends_with_all_that_is_in_it() {
    let plane = Plane::start(1, GRACE).await;
    let namespaces: Api<Namespace> = Api::all(plane.admin.clone());
    let object = json!({"metadata": {"name": "team"}});
    namespaces.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(plane.admin.clone(), "team");
    let accounts: Api<ServiceAccount> = Api::namespaced(plane.admin.clone(), "team");
    eventually("account and CA", || async {
        let map = maps.get_opt("kube-root-ca.crt").await.unwrap()?;
        accounts.get_opt("default").await.unwrap()?;
        map.data?.get("ca.crt")?.contains("BEGIN CERTIFICATE").then_some(())
    })
    .await;
    accounts.delete("default", &DeleteParams::default()).await.unwrap();
    let broken = Patch::Merge(json!({"data": {"ca.crt": "forged", "more": "x"}}));
    maps.patch("kube-root-ca.crt", &PatchParams::default(), &broken).await.unwrap();
    eventually("both are restored", || async {
        accounts.get_opt("default").await.unwrap()?;
        let data = maps.get_opt("kube-root-ca.crt").await.unwrap()?.data?;
        (data.len() == 1 && data["ca.crt"].contains("BEGIN CERTIFICATE")).then_some(())
    })
    .await;

    let deployments: Api<Deployment> = Api::namespaced(plane.admin.clone(), "team");
    let web = serde_json::from_value(deployment("web", 2, "one")).unwrap();
    deployments.create(&PostParams::default(), &web).await.unwrap();
    let held = json!({"metadata": {"name": "held", "finalizers": ["example.com/hold"]}});
    maps.create(&PostParams::default(), &serde_json::from_value(held).unwrap()).await.unwrap();
    namespaces.delete("team", &DeleteParams::default()).await.unwrap();
    let message = eventually("the finalizer is reported", || async {
        let conditions = namespaces.get("team").await.unwrap().status?.conditions?;
        let c = conditions
            .into_iter()
            .find(|c| c.type_ == "NamespaceFinalizersRemaining" && c.status == "True")?;
        c.message
    })
    .await;
    assert!(message.contains("example.com/hold in 1 resource instances"), "{message}");
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("held", &PatchParams::default(), &release).await.unwrap();
    eventually("the namespace is gone", || async {
        namespaces.get_opt("team").await.unwrap().is_none().then_some(())
    })
    .await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_held_while_running() {
    let plane = Plane::start(0, GRACE).await;
    let leases: Api<Lease> = Api::namespaced(plane.admin.clone(), "kube-system");
    for (name, holder) in [("kube-controller-manager", "test"), ("kube-scheduler", "kube-scheduler")] {
        eventually(name, || async {
            let spec = leases.get_opt(name).await.unwrap()?.spec?;
            (spec.holder_identity? == holder).then_some(())
        })
        .await;
    }
    plane.shutdown.cancel();
    for name in ["kube-controller-manager", "kube-scheduler"] {
        eventually(name, || async {
            let spec = leases.get(name).await.unwrap().spec?;
            spec.holder_identity?.is_empty().then_some(())
        })
        .await;
    }
    plane.stop().await;
}
