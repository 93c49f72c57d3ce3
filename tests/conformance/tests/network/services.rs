//! Services: node ports, changes of type, affinity, one port over two protocols.

use std::net::{IpAddr, SocketAddr};

use anyhow::ensure;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};
use weft_tests_conformance::{Outcome, Place, Request, Site, Way, server};

use crate::dns::resolves_to;
use crate::reach::{answered_by, becomes, client, cluster_address, fetched_from, from, node_port, three};

const NAMES: [&str; 3] = ["web-1", "web-2", "web-3"];
/// Requests that must all reach one pod: three pods would share them by chance once in 3^14 runs.
const STICKY: u32 = 15;

/// Three servers and a client.
async fn served(site: &Site) -> anyhow::Result<Place> {
    let mut pods = three("web");
    pods.push(client("client"));
    site.pods(pods).await?;
    Ok(from("client"))
}

fn web(extra: &Value) -> Value {
    let mut spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80, "protocol": "TCP"}]});
    for (key, value) in extra.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    spec
}

/// By name, by cluster address and, if it has one, by the port of every node.
async fn reachable(site: &Site, place: &Place, service: &Service) -> anyhow::Result<()> {
    answered_by(site, place, Way::Tcp, cluster_address(service, 0)?, &NAMES).await?;
    let name = service.metadata.name.as_deref().unwrap_or_default();
    fetched_from(site, "client", &format!("http://{name}:80/hostname"), &NAMES).await?;
    if let Ok(port) = node_port(service) {
        for (_, address) in site.nodes().await? {
            answered_by(site, place, Way::Tcp, (address, port).into(), &NAMES).await?;
        }
    }
    Ok(())
}

pub(crate) async fn node_port_service(site: Site) -> anyhow::Result<()> {
    let place = served(&site).await?;
    let service = site.service("web", web(&json!({"type": "NodePort"}))).await?;
    ensure!((30_000..32_768).contains(&node_port(&service)?), "the port is of the range");
    reachable(&site, &place, &service).await
}

pub(crate) async fn external_name_to_cluster_ip(site: Site) -> anyhow::Result<()> {
    external_name_to(&site, "ClusterIP").await
}

pub(crate) async fn external_name_to_node_port(site: Site) -> anyhow::Result<()> {
    external_name_to(&site, "NodePort").await
}

async fn external_name_to(site: &Site, kind: &str) -> anyhow::Result<()> {
    let place = served(site).await?;
    let service = site.service("web", json!({"type": "ExternalName", "externalName": "example.com"})).await?;
    ensure!(cluster_address(&service, 0).is_err(), "an ExternalName has no cluster address");
    let mut spec = web(&json!({"type": kind}));
    spec["externalName"] = Value::Null;
    let service = site.merge::<Service>("web", json!({"spec": spec})).await?;
    ensure!((kind == "NodePort") == node_port(&service).is_ok(), "a port of the nodes if that is the type");
    reachable(site, &place, &service).await
}

pub(crate) async fn cluster_ip_to_external_name(site: Site) -> anyhow::Result<()> {
    to_external_name(&site, "ClusterIP").await.map(|_| ())
}

pub(crate) async fn node_port_to_external_name(site: Site) -> anyhow::Result<()> {
    let port = to_external_name(&site, "NodePort").await?;
    // The port is free again, so another Service can ask for it.
    let ports = json!([{"port": 80, "nodePort": port}]);
    let other = site.service("other", json!({"type": "NodePort", "ports": ports})).await?;
    ensure!(Some(node_port(&other)?) == port, "the other Service has another port");
    Ok(())
}

/// Makes a Service an alias of another one; answers the port of the nodes that it had.
async fn to_external_name(site: &Site, kind: &str) -> anyhow::Result<Option<u16>> {
    let place = served(site).await?;
    let target = site.service("target", web(&json!({}))).await?;
    let service = site.service("web", web(&json!({"type": kind}))).await?;
    let (old, port) = (cluster_address(&service, 0)?, node_port(&service).ok());
    ensure!((kind == "NodePort") == port.is_some(), "a port of the nodes if that is the type");
    answered_by(site, &place, Way::Tcp, old, &NAMES).await?;
    let alias = format!("target.{}.svc.cluster.local", site.namespace);
    let spec = json!({"type": "ExternalName", "externalName": alias, "ports": null, "selector": null});
    let service = site.merge::<Service>("web", json!({"spec": spec})).await?;
    let left = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()).unwrap_or_default();
    ensure!(left.is_empty(), "an ExternalName has no cluster address, and this has {left}");
    resolves_to(site, "client", "web", &[cluster_address(&target, 0)?.ip()]).await?;
    if let Some(port) = port {
        for (_, address) in site.nodes().await? {
            becomes(site, &place, Way::Tcp, (address, port).into(), &Outcome::Refused).await?;
        }
    }
    Ok(port)
}

pub(crate) async fn affinity_cluster_ip(site: Site) -> anyhow::Result<()> {
    affinity(&site, "ClusterIP", false).await
}

pub(crate) async fn affinity_node_port(site: Site) -> anyhow::Result<()> {
    affinity(&site, "NodePort", false).await
}

pub(crate) async fn switch_affinity_cluster_ip(site: Site) -> anyhow::Result<()> {
    affinity(&site, "ClusterIP", true).await
}

pub(crate) async fn switch_affinity_node_port(site: Site) -> anyhow::Result<()> {
    affinity(&site, "NodePort", true).await
}

async fn affinity(site: &Site, kind: &str, switch: bool) -> anyhow::Result<()> {
    let place = served(site).await?;
    let spec = web(&json!({"type": kind, "sessionAffinity": "ClientIP"}));
    let service = site.service("web", spec).await?;
    let to = entry(site, &service).await?;
    fetched_from(site, "client", "http://web:80/hostname", &NAMES).await?;
    sticky(site, &place, to).await?;
    if switch {
        site.merge::<Service>("web", json!({"spec": {"sessionAffinity": "None"}})).await?;
        answered_by(site, &place, Way::Tcp, to, &NAMES).await?;
        site.merge::<Service>("web", json!({"spec": {"sessionAffinity": "ClientIP"}})).await?;
        sticky(site, &place, to).await?;
    }
    Ok(())
}

/// Where clients ask: the first node's port, or the cluster address.
async fn entry(site: &Site, service: &Service) -> anyhow::Result<SocketAddr> {
    let Ok(port) = node_port(service) else { return cluster_address(service, 0) };
    let nodes = site.nodes().await?;
    let address = nodes.first().map(|(_, address)| *address);
    Ok((address.unwrap_or(IpAddr::from([0; 4])), port).into())
}

/// Waits until all of a client's requests reach one pod.
async fn sticky(site: &Site, place: &Place, to: SocketAddr) -> anyhow::Result<()> {
    site.until(&format!("{to} sticks to one pod"), async || {
        let outcomes = place.ask(site, &[Request::new(Way::Tcp, to).times(STICKY)]).await?.concat();
        let first = outcomes.first().and_then(Outcome::by);
        ensure!(
            first.is_some_and(|name| NAMES.contains(&name)),
            "the first outcome is {:?}",
            outcomes.first()
        );
        ensure!(outcomes.iter().all(|outcome| outcome.by() == first), "the outcomes are {outcomes:?}");
        Ok(Some(()))
    })
    .await
}

pub(crate) async fn same_port_two_protocols(site: Site) -> anyhow::Result<()> {
    site.pods(vec![server("web-1", "web", &["80/tcp", "80/udp"]), client("client")]).await?;
    let place = from("client");
    let port = |protocol: &str| json!({"name": protocol, "port": 80, "protocol": protocol.to_uppercase()});
    let spec = json!({"selector": {"app": "web"}, "ports": [port("tcp"), port("udp")]});
    let to = cluster_address(&site.service("web", spec).await?, 0)?;
    for (ports, served, refused) in [
        (json!([port("tcp"), port("udp")]), &[Way::Tcp, Way::Udp][..], &[][..]),
        (json!([port("tcp")]), &[Way::Tcp], &[Way::Udp]),
        (json!([port("udp")]), &[Way::Udp], &[Way::Tcp]),
    ] {
        site.merge::<Service>("web", json!({"spec": {"ports": ports}})).await?;
        for way in served {
            answered_by(&site, &place, *way, to, &["web-1"]).await?;
        }
        for way in refused {
            site.until(&format!("{way:?} fails"), async || {
                let outcome = place.ask_one(&site, *way, to).await?;
                ensure!(outcome.by().is_none(), "{outcome:?}");
                Ok(Some(()))
            })
            .await?;
        }
    }
    Ok(())
}
