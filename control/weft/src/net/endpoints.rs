//! Endpoints as the API has them: which slice and which pod is behind an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use weft_agent_dataplane::observe::wire::{BackendKeyed, Protocol};

/// An endpoint of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Endpoint {
    /// The slice that has it: namespace/name.
    pub(crate) slice: String,
    /// The pod behind it: namespace/name.
    pub(crate) pod: Option<String>,
    /// Its node.
    pub(crate) node: Option<String>,
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
}

impl Endpoint {
    /// How far it takes traffic, in a word.
    pub(crate) fn state(&self) -> &'static str {
        match (self.ready, self.serving, self.terminating) {
            (true, _, _) => "ready",
            (false, true, true) => "terminating",
            (false, false, true) => "terminating, not ready",
            (false, _, false) => "not ready",
        }
    }
}

/// The endpoints that a node leaves out, and why: theirs is among the `silent`, or connections to them failed.
pub(crate) fn left_out(
    endpoints: &BTreeMap<BackendKeyed, Endpoint>,
    silent: &BTreeSet<String>,
    ejected: &BTreeSet<BackendKeyed>,
) -> BTreeMap<BackendKeyed, String> {
    let usable = endpoints.iter().filter(|(_, e)| e.ready || (e.serving && e.terminating));
    let on_silent =
        usable.filter_map(|(key, e)| Some((key, e.node.as_ref().filter(|n| silent.contains(*n))?)));
    let on_silent = on_silent.map(|(key, node)| (*key, format!("node {node} doesn't answer")));
    let failing = ejected.iter().map(|key| (*key, "connections to it failed".to_owned()));
    failing.chain(on_silent).collect()
}

/// The endpoints of slices, by address and port.
pub(crate) fn by_address(slices: &[EndpointSlice]) -> BTreeMap<BackendKeyed, Endpoint> {
    let mut found = BTreeMap::new();
    for slice in slices {
        let name = format!(
            "{}/{}",
            slice.metadata.namespace.as_deref().unwrap_or_default(),
            slice.metadata.name.as_deref().unwrap_or_default()
        );
        for port in slice.ports.iter().flatten() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP").parse::<Protocol>();
            let number = port.port.and_then(|port| u16::try_from(port).ok());
            let (Ok(protocol), Some(number)) = (protocol, number) else { continue };
            for endpoint in slice.endpoints.iter().flatten() {
                let Some(address) = endpoint.addresses.first().and_then(|a| a.parse::<IpAddr>().ok()) else {
                    continue;
                };
                let key = BackendKeyed { address, port: number, protocol };
                let entry = read(&name, endpoint);
                // While an address passes from one pod to another both are listed: the ready one is meant.
                match found.get(&key) {
                    Some(Endpoint { ready: true, .. }) if !entry.ready => {}
                    _ => drop(found.insert(key, entry)),
                }
            }
        }
    }
    found
}

fn read(slice: &str, endpoint: &k8s_openapi::api::discovery::v1::Endpoint) -> Endpoint {
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let target = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    Endpoint {
        slice: slice.to_owned(),
        pod: target.and_then(|t| Some(format!("{}/{}", t.namespace.as_deref()?, t.name.as_deref()?))),
        node: endpoint.node_name.clone(),
        ready,
        serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
    }
}
