//! Service ranges, load-balancer addresses, mirrored and hinted endpoints.

use super::support::{Plane, deployment, eventually};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Endpoints, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use std::time::Duration;

const GRACE: Duration = Duration::from_secs(40);

async fn slices(plane: &Plane, service: &str) -> Vec<EndpointSlice> {
    let of = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
    plane.api::<EndpointSlice>().list(&of).await.unwrap().items
}

/// The slices of a Service as soon as they are as `check` wants them.
async fn slices_when(
    plane: &Plane,
    service: &str,
    check: impl Fn(&[EndpointSlice]) -> bool,
) -> Vec<EndpointSlice> {
    let check = &check;
    eventually("the slices", || async move {
        let found = slices(plane, service).await;
        check(&found).then_some(found)
    })
    .await
}

async fn patch(plane: &Plane, name: &str, patch: Value) -> Service {
    plane.api::<Service>().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap()
}

fn first_address(slices: &[EndpointSlice]) -> Option<&str> {
    Some(slices.first()?.endpoints.as_ref()?.first()?.addresses.first()?.as_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_by_hand_are_mirrored() {
    let plane = Plane::start(1, GRACE).await;
    plane.create::<Service>(json!({"metadata": {"name": "db"}, "spec": {"ports": [{"port": 5432}]}})).await;
    let by_hand = |ip: &str| {
        json!({"metadata": {"name": "db", "labels": {"made": "by-hand"}},
            "subsets": [{"addresses": [{"ip": ip}], "ports": [{"port": 5432, "protocol": "TCP"}]}]})
    };
    plane.create::<Endpoints>(by_hand("198.51.100.7")).await;
    let mirrored = slices_when(&plane, "db", |all| first_address(all) == Some("198.51.100.7")).await;
    let labels = mirrored[0].metadata.labels.as_ref().unwrap();
    assert_eq!(labels["endpointslice.kubernetes.io/managed-by"], "endpointslicemirroring-controller.k8s.io");
    assert_eq!((labels["made"].as_str(), mirrored[0].address_type.as_str()), ("by-hand", "IPv4"));
    assert_eq!(mirrored[0].metadata.owner_references.as_ref().unwrap()[0].kind, "Endpoints");
    let api = plane.api::<Endpoints>();
    let other = Patch::Merge(by_hand("198.51.100.8"));
    api.patch("db", &PatchParams::default(), &other).await.unwrap();
    let changed = slices_when(&plane, "db", |all| first_address(all) == Some("198.51.100.8")).await;
    assert_eq!((changed.len(), &changed[0].metadata.name), (1, &mirrored[0].metadata.name));
    // Who says so isn't mirrored; who gets a selector has endpoints of its own.
    let skip = json!({"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}}});
    api.patch("db", &PatchParams::default(), &Patch::Merge(skip)).await.unwrap();
    slices_when(&plane, "db", <[_]>::is_empty).await;
    let again = json!({"metadata": {"labels": {"endpointslice.kubernetes.io/skip-mirror": null}}});
    api.patch("db", &PatchParams::default(), &Patch::Merge(again)).await.unwrap();
    slices_when(&plane, "db", |all| all.len() == 1).await;
    api.delete("db", &DeleteParams::default()).await.unwrap();
    slices_when(&plane, "db", <[_]>::is_empty).await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_follow_families_and_carry_hints() {
    let plane = Plane::start(1, GRACE).await;
    let nodes: Api<Node> = Api::all(plane.admin.clone());
    let zone = Patch::Merge(json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "z1"}}}));
    nodes.patch("node-0", &PatchParams::default(), &zone).await.unwrap();
    plane.create::<Deployment>(deployment("web", 2, "one")).await;
    let service = json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"},
        "ipFamilyPolicy": "RequireDualStack", "trafficDistribution": "PreferSameNode",
        "ports": [{"port": 80, "targetPort": 8080}]}});
    plane.create::<Service>(service).await;
    let full = |all: &[EndpointSlice]| {
        let v4 = all.iter().find(|s| s.address_type == "IPv4");
        let ready = v4.into_iter().flat_map(|s| s.endpoints.iter().flatten());
        let ready = ready.filter(|e| e.conditions.as_ref().is_some_and(|c| c.ready == Some(true)));
        all.len() == 2 && ready.count() == 2
    };
    let both = slices_when(&plane, "web", full).await;
    let v4 = both.iter().find(|s| s.address_type == "IPv4").unwrap();
    let hints = v4.endpoints.as_ref().unwrap()[0].hints.clone().unwrap();
    assert_eq!(hints.for_zones.unwrap()[0].name, "z1");
    assert_eq!(hints.for_nodes.unwrap()[0].name, "node-0");
    assert!(
        v4.metadata
            .annotations
            .as_ref()
            .unwrap()
            .contains_key("endpoints.kubernetes.io/last-change-trigger-time")
    );
    patch(&plane, "web", json!({"spec": {"trafficDistribution": "PreferSameZone"}})).await;
    slices_when(&plane, "web", |all| {
        let v4 = all.iter().find(|s| s.address_type == "IPv4");
        let hints = v4.and_then(|s| s.endpoints.as_ref()?.first()?.hints.as_ref());
        hints.is_some_and(|hints| hints.for_nodes.is_none() && hints.for_zones.is_some())
    })
    .await;
    patch(&plane, "web", json!({"spec": {"trafficDistribution": null}})).await;
    slices_when(&plane, "web", |all| {
        all.iter().flat_map(|s| s.endpoints.iter().flatten()).all(|endpoint| endpoint.hints.is_none())
    })
    .await;
    // Back to one family: the slices of the other go.
    patch(&plane, "web", json!({"spec": {"ipFamilyPolicy": "SingleStack"}})).await;
    slices_when(&plane, "web", |all| all.len() == 1 && all[0].address_type == "IPv4").await;
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_stays_as_long_as_it_is_needed() {
    let plane = Plane::start(0, GRACE).await;
    let api: Api<ServiceCIDR> = Api::all(plane.admin.clone());
    let (api, plane) = (&api, &plane);
    let ready = |name: &'static str, status: &'static str| async move {
        eventually("the condition Ready", || async move {
            let found = api.get_opt(name).await.unwrap()?;
            let conditions = found.status.as_ref()?.conditions.clone()?;
            let ready = conditions.into_iter().find(|one| one.type_ == "Ready" && one.status == status)?;
            Some((ready.reason, found.metadata.finalizers.unwrap_or_default()))
        })
        .await
    };
    let finalizer = "networking.k8s.io/service-cidr-finalizer".to_owned();
    assert_eq!(ready("kubernetes", "True").await, (String::new(), vec![finalizer.clone()]));
    let more = json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.99.0.0/24"]}});
    api.create(&PostParams::default(), &serde_json::from_value(more).unwrap()).await.unwrap();
    ready("more", "True").await;
    let service = |name: &str, ip: &str| json!({"metadata": {"name": name}, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}});
    plane.create::<Service>(service("kept", "10.99.0.9")).await;
    api.delete("more", &DeleteParams::default()).await.unwrap();
    assert_eq!(ready("more", "False").await, ("Terminating".to_owned(), vec![finalizer]));
    // It gives nothing any more, and goes with the last address.
    let late = serde_json::from_value(service("late", "10.99.0.10")).unwrap();
    let refused = plane.api::<Service>().create(&PostParams::default(), &late).await.unwrap_err();
    assert!(refused.to_string().contains("does not match the current range"), "{refused}");
    plane.api::<Service>().delete("kept", &DeleteParams::default()).await.unwrap();
    eventually(
        "the range is gone",
        || async move { api.get_opt("more").await.unwrap().is_none().then_some(()) },
    )
    .await;
}

async fn balanced(plane: &Plane, name: &str) -> Vec<String> {
    let service = plane.api::<Service>().get(name).await.unwrap();
    let balancer = service.status.and_then(|status| status.load_balancer).unwrap_or_default();
    let ingress = balancer.ingress.unwrap_or_default();
    assert!(ingress.iter().all(|one| one.ip_mode.as_deref() == Some("VIP")));
    ingress.into_iter().filter_map(|one| one.ip).collect()
}

async fn has_address(plane: &Plane, name: &str, address: &str) {
    eventually(&format!("{name} has {address}"), || async move {
        (balanced(plane, name).await == [address]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn balancers_get_addresses_of_the_pool() {
    let plane = Plane::start(0, GRACE).await;
    let service = |name: &str, port: u16, annotations: Value, spec: Value| {
        let mut service = json!({"metadata": {"name": name, "annotations": annotations},
            "spec": {"type": "LoadBalancer", "ports": [{"port": port}]}});
        for (key, value) in spec.as_object().unwrap() {
            service["spec"][key] = value.clone();
        }
        service
    };
    // The pool, 192.0.2.0/29, has six addresses.
    plane.create::<Service>(service("asks", 80, json!({}), json!({"loadBalancerIP": "192.0.2.5"}))).await;
    has_address(&plane, "asks", "192.0.2.5").await;
    let share = json!({"weft.dev/load-balancer-share": "edge"});
    plane.create::<Service>(service("one", 80, share.clone(), json!({}))).await;
    has_address(&plane, "one", "192.0.2.1").await;
    plane.create::<Service>(service("two", 443, share, json!({}))).await;
    has_address(&plane, "two", "192.0.2.1").await;
    plane
        .create::<Service>(service("foreign", 80, json!({}), json!({"loadBalancerClass": "example.com/lb"})))
        .await;
    for (number, address) in [(2, "192.0.2.2"), (3, "192.0.2.3"), (4, "192.0.2.4"), (6, "192.0.2.6")] {
        let name = format!("plain{number}");
        plane.create::<Service>(service(&name, 80, json!({}), json!({}))).await;
        has_address(&plane, &name, address).await;
    }
    plane.create::<Service>(service("late", 80, json!({}), json!({}))).await;
    eventually("an Event that the pool is empty", || async {
        let events = plane.events("SyncLoadBalancerFailed").await;
        let message = "Error syncing load balancer: no address is free in the pools 192.0.2.0/29";
        events.iter().any(|event| event == message).then_some(())
    })
    .await;
    // What is given back goes to who waits: by a change of type, then by a deletion.
    patch(&plane, "plain3", json!({"spec": {"type": "ClusterIP"}})).await;
    has_address(&plane, "late", "192.0.2.3").await;
    assert!(balanced(&plane, "plain3").await.is_empty() && balanced(&plane, "foreign").await.is_empty());
    plane.create::<Service>(service("later", 80, json!({}), json!({"loadBalancerIP": "192.0.2.5"}))).await;
    eventually("an Event that the address is taken", || async {
        let events = plane.events("SyncLoadBalancerFailed").await;
        events.iter().any(|event| event.contains("192.0.2.5 is in use by Service default/asks")).then_some(())
    })
    .await;
    plane.api::<Service>().delete("asks", &DeleteParams::default()).await.unwrap();
    has_address(&plane, "later", "192.0.2.5").await;
    // A status that somebody else writes is put right.
    let wrong = Patch::Merge(json!({"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}}));
    plane.api::<Service>().patch_status("one", &PatchParams::default(), &wrong).await.unwrap();
    has_address(&plane, "one", "192.0.2.1").await;
    plane.stop().await;
}
