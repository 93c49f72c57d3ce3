//! Who answers at an address, asked from somewhere.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};
use weft_tests_conformance::{Outcome, Place, Request, Site, Way, server};

/// Questions for each pod that shall answer: enough that leaving one out by chance is rarer than a broken machine.
const QUESTIONS_EACH: u32 = 12;

/// A pod that only asks.
pub(crate) fn client(name: &str) -> Value {
    let mut pod = server(name, "client", &[]);
    pod["spec"]["containers"][0]["command"] = json!(["sleep", "100000"]);
    pod
}

/// A pod that only asks, by name.
pub(crate) fn from(pod: &str) -> Place {
    Place::Pod(pod.to_owned())
}

/// The Service's address in the cluster, with the port at `index`.
pub(crate) fn cluster_address(service: &Service, index: usize) -> anyhow::Result<SocketAddr> {
    let spec = service.spec.as_ref().context("the Service has no spec")?;
    let ip: IpAddr = spec.cluster_ip.as_deref().context("the Service has no clusterIP")?.parse()?;
    let port = spec.ports.iter().flatten().nth(index).context("the Service has no such port")?.port;
    Ok((ip, u16::try_from(port)?).into())
}

/// The port on every node of the Service's first port.
pub(crate) fn node_port(service: &Service) -> anyhow::Result<u16> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref());
    let port = ports.and_then(|ports| ports.first()).and_then(|port| port.node_port);
    Ok(u16::try_from(port.context("the Service has no nodePort")?)?)
}

/// Waits until these answer, all of them and nobody else, and no question is lost.
pub(crate) async fn answered_by(
    site: &Site,
    place: &Place,
    way: Way,
    to: SocketAddr,
    names: &[&str],
) -> anyhow::Result<()> {
    let wanted: BTreeSet<&str> = names.iter().copied().collect();
    let count = if names.len() == 1 { 3 } else { QUESTIONS_EACH * u32::try_from(names.len())? };
    let request = Request::new(way, to).times(count);
    site.until(&format!("{to} is answered by {names:?}"), async || {
        let outcomes = place.ask(site, std::slice::from_ref(&request)).await?.concat();
        let lost: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.by().is_none()).collect();
        ensure!(lost.is_empty(), "{} of {count} got no answer: {:?}", lost.len(), lost.first());
        let answered: BTreeSet<&str> = outcomes.iter().filter_map(Outcome::by).collect();
        ensure!(answered == wanted, "answered by {answered:?}");
        Ok(Some(()))
    })
    .await
}

/// Waits until the question becomes this.
pub(crate) async fn becomes(
    site: &Site,
    place: &Place,
    way: Way,
    to: SocketAddr,
    wanted: &Outcome,
) -> anyhow::Result<()> {
    site.until(&format!("{way:?} to {to} becomes {wanted:?}"), async || {
        let outcome = place.ask_one(site, way, to).await?;
        ensure!(outcome == *wanted, "it was {outcome:?}");
        Ok(Some(()))
    })
    .await
}

/// Waits until a URL, fetched in a pod, says which pod answered, one of these.
pub(crate) async fn fetched_from(site: &Site, pod: &str, url: &str, names: &[&str]) -> anyhow::Result<()> {
    site.until(&format!("{url} is answered by one of {names:?}"), async || {
        let said = site.exec(pod, &["wget", "-qO-", url]).await?;
        ensure!(said.success, "{}", said.err);
        ensure!(names.contains(&said.out.trim()), "answered by {:?}", said.out);
        Ok(Some(()))
    })
    .await
}

/// Three servers of one application.
pub(crate) fn three(app: &str) -> Vec<Value> {
    (1..=3).map(|number| server(&format!("{app}-{number}"), app, &["80/tcp", "80/udp"])).collect()
}
