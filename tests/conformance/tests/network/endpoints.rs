//! Endpoints and EndpointSlices: who makes them, what is in them, and that traffic follows.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, PostParams};
use serde_json::{Value, json};
use weft_tests_conformance::{Outcome, Site, Way, address_of, server};

use crate::reach::{answered_by, becomes, client, cluster_address, from};

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// An endpoint as a client finds it: name of the port, address, number of the port.
type Found = BTreeSet<(String, IpAddr, i32)>;

/// The ready endpoints in a Service's slices.
async fn in_slices(api: &Api<EndpointSlice>, service: &str) -> anyhow::Result<(usize, Found)> {
    let list = api.list(&ListParams::default().labels(&format!("{SERVICE_NAME}={service}"))).await?;
    let mut found = Found::new();
    for slice in &list.items {
        for endpoint in slice.endpoints.iter().flatten() {
            if endpoint.conditions.as_ref().and_then(|c| c.ready) == Some(false) {
                continue;
            }
            for (address, port) in
                endpoint.addresses.iter().flat_map(|a| slice.ports.iter().flatten().map(move |p| (a, p)))
            {
                let name = port.name.clone().unwrap_or_default();
                found.insert((name, address.parse()?, port.port.unwrap_or_default()));
            }
        }
    }
    Ok((list.items.len(), found))
}

/// The ready addresses of an Endpoints object; `None` if there is no such object.
async fn in_endpoints(api: &Api<Endpoints>, service: &str) -> anyhow::Result<Option<Found>> {
    let Some(object) = api.get_opt(service).await? else { return Ok(None) };
    let mut found = Found::new();
    for subset in object.subsets.iter().flatten() {
        for address in subset.addresses.iter().flatten() {
            for port in subset.ports.iter().flatten() {
                found.insert((port.name.clone().unwrap_or_default(), address.ip.parse()?, port.port));
            }
        }
    }
    Ok(Some(found))
}

/// Waits until slices and, if `both`, Endpoints say exactly this.
async fn published(site: &Site, service: &str, wanted: &Found) -> anyhow::Result<()> {
    site.until(&format!("{service} has the endpoints {wanted:?}"), async || {
        let (slices, found) = in_slices(&site.api(), service).await?;
        ensure!(slices > 0 && found == *wanted, "{slices} slices say {found:?}");
        let found = in_endpoints(&site.api(), service).await?;
        ensure!(found.as_ref() == Some(wanted), "Endpoints say {found:?}");
        Ok(Some(()))
    })
    .await
}

/// Waits until neither is there.
async fn gone(site: &Site, service: &str) -> anyhow::Result<()> {
    site.until(&format!("the endpoints of {service} are gone"), async || {
        let (slices, _) = in_slices(&site.api(), service).await?;
        let endpoints = in_endpoints(&site.api(), service).await?;
        ensure!(slices == 0 && endpoints.is_none(), "{slices} slices and {endpoints:?} are left");
        Ok(Some(()))
    })
    .await
}

fn row(name: &str, address: IpAddr, port: i32) -> (String, IpAddr, i32) {
    (name.to_owned(), address, port)
}

pub(crate) async fn secure_master(site: Site) -> anyhow::Result<()> {
    let service = Api::<Service>::namespaced(site.client.clone(), "default").get("kubernetes").await?;
    let ports = service.spec.and_then(|spec| spec.ports).unwrap_or_default();
    let secure = ports.iter().find(|port| port.name.as_deref() == Some("https"));
    ensure!(secure.is_some_and(|port| port.port == 443), "its ports are {ports:?}");
    Ok(())
}

pub(crate) async fn of_the_api_server(site: Site) -> anyhow::Result<()> {
    let (slices, in_slices) =
        in_slices(&Api::namespaced(site.client.clone(), "default"), "kubernetes").await?;
    let in_endpoints = in_endpoints(&Api::namespaced(site.client.clone(), "default"), "kubernetes").await?;
    ensure!(slices > 0 && !in_slices.is_empty(), "{slices} slices say {in_slices:?}");
    ensure!(in_endpoints.as_ref() == Some(&in_slices), "{in_endpoints:?} is not {in_slices:?}");
    // Each listens.
    site.pod(client("client")).await?;
    for (name, address, port) in in_slices {
        ensure!(name == "https", "the port is called {name}");
        let (address, port) = (address.to_string(), port.to_string());
        let said = site.exec("client", &["nc", "-w", "5", &address, &port, "-e", "true"]).await?;
        ensure!(said.success, "{address}:{port}: {said:?}");
    }
    Ok(())
}

/// Pods with a port of the same name but another number, behind Services that name or number it.
async fn of_pods(site: &Site) -> anyhow::Result<()> {
    let pod = |name: &str, port: u16| {
        let mut pod = server(name, "match", &[&format!("{port}/tcp")]);
        pod["spec"]["containers"][0]["ports"] = json!([{"name": "web", "containerPort": port}]);
        pod
    };
    let by_name = json!([{"name": "named", "port": 80, "targetPort": "web"}]);
    let by_number = json!([{"name": "numbered", "port": 80, "targetPort": 3001}]);
    for (name, ports) in [("by-name", by_name), ("by-number", by_number)] {
        site.service(name, json!({"selector": {"app": "match"}, "ports": ports})).await?;
        published(site, name, &Found::new()).await?;
    }
    let pods = site.pods(vec![pod("one", 3000), pod("two", 3001), client("client")]).await?;
    let (one, two) = (address_of(&pods[0])?, address_of(&pods[1])?);
    published(site, "by-name", &Found::from([row("named", one, 3000), row("named", two, 3001)])).await?;
    let numbered = Found::from([row("numbered", one, 3001), row("numbered", two, 3001)]);
    published(site, "by-number", &numbered).await?;
    targets(site, "by-name", &pods[..2]).await?;
    let service = site.api::<Service>().get("by-name").await?;
    answered_by(site, &from("client"), Way::Tcp, cluster_address(&service, 0)?, &["one", "two"]).await?;
    site.delete::<Pod>("two").await?;
    published(site, "by-name", &Found::from([row("named", one, 3000)])).await?;
    for name in ["by-name", "by-number"] {
        site.delete::<Service>(name).await?;
        gone(site, name).await?;
    }
    Ok(())
}

/// Each endpoint names its pod and the pod's node.
async fn targets(site: &Site, service: &str, pods: &[Pod]) -> anyhow::Result<()> {
    let selected = ListParams::default().labels(&format!("{SERVICE_NAME}={service}"));
    let slices = site.api::<EndpointSlice>().list(&selected).await?.items;
    let endpoints: Vec<_> =
        slices.into_iter().flat_map(|slice| slice.endpoints.unwrap_or_default()).collect();
    for pod in pods {
        let address = address_of(pod)?.to_string();
        let endpoint = endpoints.iter().find(|endpoint| endpoint.addresses.contains(&address));
        let endpoint = endpoint.with_context(|| format!("{address} is in no slice"))?;
        let target = endpoint.target_ref.as_ref().context("the endpoint has no target")?;
        ensure!(target.kind.as_deref() == Some("Pod") && target.name == pod.metadata.name, "{target:?}");
        ensure!(target.uid == pod.metadata.uid, "{target:?}");
        ensure!(endpoint.node_name == pod.spec.as_ref().and_then(|s| s.node_name.clone()), "{endpoint:?}");
    }
    Ok(())
}

pub(crate) async fn slices_for_pods(site: Site) -> anyhow::Result<()> {
    of_pods(&site).await
}

pub(crate) async fn endpoints_for_pods(site: Site) -> anyhow::Result<()> {
    of_pods(&site).await
}

/// A Service that selects nothing has empty endpoints, until it is deleted.
async fn of_nothing(site: &Site) -> anyhow::Result<()> {
    let spec = json!({"selector": {"app": "nobody"}, "ports": [{"name": "web", "port": 80}]});
    let service = site.service("empty", spec).await?;
    published(site, "empty", &Found::new()).await?;
    let selected = ListParams::default().labels(&format!("{SERVICE_NAME}=empty"));
    for slice in site.api::<EndpointSlice>().list(&selected).await? {
        let owner = slice.metadata.owner_references.iter().flatten().find(|o| o.controller == Some(true));
        ensure!(owner.is_some_and(|o| Some(&o.uid) == service.metadata.uid.as_ref()), "{:?}", slice.metadata);
    }
    site.delete::<Service>("empty").await?;
    gone(site, "empty").await
}

pub(crate) async fn slices_of_nothing(site: Site) -> anyhow::Result<()> {
    of_nothing(&site).await
}

pub(crate) async fn endpoints_of_nothing(site: Site) -> anyhow::Result<()> {
    of_nothing(&site).await
}

fn slice(name: &str, service: &str, address: IpAddr, port: u16) -> Value {
    json!({
        "metadata": {"name": name, "labels": {SERVICE_NAME: service}},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
    })
}

pub(crate) async fn several_ports(site: Site) -> anyhow::Result<()> {
    let pods = vec![server("one", "manual", &["8090/tcp=first", "8091/tcp=second"]), client("client")];
    let address = address_of(&site.pods(pods).await?[0])?;
    let service = site.service("manual", json!({"ports": [{"name": "web", "port": 80}]})).await?;
    site.create::<EndpointSlice>(slice("manual-a", "manual", address, 8090)).await?;
    site.create::<EndpointSlice>(slice("manual-b", "manual", address, 8091)).await?;
    answered_by(&site, &from("client"), Way::Tcp, cluster_address(&service, 0)?, &["first", "second"]).await
}

pub(crate) async fn several_addresses(site: Site) -> anyhow::Result<()> {
    let pods = vec![server("one", "a", &["8090/tcp"]), server("two", "b", &["8091/tcp"]), client("client")];
    let pods = site.pods(pods).await?;
    let service = site.service("manual", json!({"ports": [{"name": "web", "port": 80}]})).await?;
    site.create::<EndpointSlice>(slice("manual-a", "manual", address_of(&pods[0])?, 8090)).await?;
    site.create::<EndpointSlice>(slice("manual-b", "manual", address_of(&pods[1])?, 8091)).await?;
    answered_by(&site, &from("client"), Way::Tcp, cluster_address(&service, 0)?, &["one", "two"]).await
}

pub(crate) async fn mirroring(site: Site) -> anyhow::Result<()> {
    let address = |last: u8| IpAddr::from([10, 1, 2, last]);
    site.service("custom", json!({"ports": [{"name": "example", "port": 80}]})).await?;
    let subsets = |last: u8| json!([{"addresses": [{"ip": address(last)}], "ports": [{"name": "example", "port": 80}]}]);
    site.create::<Endpoints>(json!({"metadata": {"name": "custom"}, "subsets": subsets(3)})).await?;
    let mirrored = async |wanted: &Found| {
        site.until(&format!("the mirror says {wanted:?}"), async || {
            let label = format!("{SERVICE_NAME}=custom,endpointslice.kubernetes.io/managed-by=endpointslicemirroring-controller.k8s.io");
            let list = site.api::<EndpointSlice>().list(&ListParams::default().labels(&label)).await?;
            let (_, found) = in_slices(&site.api(), "custom").await?;
            ensure!(found == *wanted && list.items.len() == usize::from(!wanted.is_empty()), "it says {found:?}, in {} slices", list.items.len());
            Ok(Some(()))
        })
        .await
    };
    mirrored(&Found::from([row("example", address(3), 80)])).await?;
    site.merge::<Endpoints>("custom", json!({"subsets": subsets(4)})).await?;
    mirrored(&Found::from([row("example", address(4), 80)])).await?;
    site.delete::<Endpoints>("custom").await?;
    mirrored(&Found::new()).await
}

pub(crate) async fn basic(site: Site) -> anyhow::Result<()> {
    let spec = json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 80}]});
    let service = site.service("web", spec).await?;
    published(&site, "web", &Found::new()).await?;
    site.pod(client("client")).await?;
    let (place, to) = (from("client"), cluster_address(&service, 0)?);
    becomes(&site, &place, Way::Tcp, to, &Outcome::Refused).await?;
    let mut wanted = Found::new();
    for names in [&["one"][..], &["one", "two"]] {
        let newest = names.last().context("there is a newest")?;
        let pod = site.pod(server(newest, "web", &["80/tcp"])).await?;
        wanted.insert(row("http", address_of(&pod)?, 80));
        published(&site, "web", &wanted).await?;
        answered_by(&site, &place, Way::Tcp, to, names).await?;
    }
    let one = address_of(&site.api::<Pod>().get("one").await?)?;
    site.delete::<Pod>("one").await?;
    wanted.remove(&row("http", one, 80));
    published(&site, "web", &wanted).await?;
    answered_by(&site, &place, Way::Tcp, to, &["two"]).await?;
    site.delete::<Pod>("two").await?;
    published(&site, "web", &Found::new()).await?;
    becomes(&site, &place, Way::Tcp, to, &Outcome::Refused).await
}

pub(crate) async fn multiport(site: Site) -> anyhow::Result<()> {
    let ports = json!([
        {"name": "one", "port": 80, "targetPort": "first"},
        {"name": "two", "port": 81, "targetPort": "second"},
    ]);
    let service = site.service("multi", json!({"selector": {"app": "multi"}, "ports": ports})).await?;
    published(&site, "multi", &Found::new()).await?;
    site.pod(client("client")).await?;
    let place = from("client");
    let pod = |name: &str, port_name: &str, port: u16| {
        let mut pod = server(name, "multi", &[&format!("{port}/tcp")]);
        pod["spec"]["containers"][0]["ports"] = json!([{"name": port_name, "containerPort": port}]);
        pod
    };
    let first = address_of(&site.pod(pod("one", "first", 100)).await?)?;
    published(&site, "multi", &Found::from([row("one", first, 100)])).await?;
    let second = address_of(&site.pod(pod("two", "second", 101)).await?)?;
    published(&site, "multi", &Found::from([row("one", first, 100), row("two", second, 101)])).await?;
    answered_by(&site, &place, Way::Tcp, cluster_address(&service, 0)?, &["one"]).await?;
    answered_by(&site, &place, Way::Tcp, cluster_address(&service, 1)?, &["two"]).await?;
    site.delete::<Pod>("one").await?;
    published(&site, "multi", &Found::from([row("two", second, 101)])).await?;
    answered_by(&site, &place, Way::Tcp, cluster_address(&service, 1)?, &["two"]).await?;
    becomes(&site, &place, Way::Tcp, cluster_address(&service, 0)?, &Outcome::Refused).await?;
    site.delete::<Pod>("two").await?;
    published(&site, "multi", &Found::new()).await
}

/// The time from a Service's creation to its endpoints, a hundred times. The bounds are the spec's own, and liberal.
pub(crate) async fn latency(site: Site) -> anyhow::Result<()> {
    const TRIALS: u32 = 100;
    let pod = site.pod(server("one", "latency", &["80/tcp"])).await?;
    let wanted = Found::from([row("", address_of(&pod)?, 80)]);
    let spec = json!({"selector": {"app": "latency"}, "ports": [{"port": 80}]});
    let mut took = Vec::new();
    for number in 0..TRIALS {
        let name = format!("latency-{number}");
        let begin = Instant::now();
        let object = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
        site.api::<Service>().create(&PostParams::default(), &object).await?;
        site.until(&format!("{name} has its endpoint"), async || {
            Ok(in_endpoints(&site.api(), &name).await?.filter(|found| *found == wanted))
        })
        .await?;
        took.push(begin.elapsed());
    }
    took.sort_unstable();
    let (half, most) = (took[took.len() / 2], took[took.len() * 9 / 10]);
    ensure!(half < Duration::from_secs(20), "the 50th percentile is {half:?}");
    ensure!(most < Duration::from_secs(50), "the 90th percentile is {most:?}");
    Ok(())
}
