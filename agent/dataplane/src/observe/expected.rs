//! What a node's maps should say about a Service, in the words of the answers: to be compared with what they say.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use std::net::IpAddr;
use weft_ebpf_abi::Address;

use super::wire::{BackendKeyed, Frontend, FrontendKey, Protocol};
use crate::desired::desired;
use crate::tables::{Tables, service_name, wire};

/// What a node should have of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Addresses and ports, with the backends of their lists.
    pub frontends: BTreeMap<FrontendKey, BTreeSet<BackendKeyed>>,
    /// Every endpoint, in a list or not.
    pub backends: BTreeSet<BackendKeyed>,
    /// Backends that are left out because connections to them failed.
    pub ejected: BTreeSet<BackendKeyed>,
    /// Some backends have more places than others.
    pub weighted: bool,
}

/// A node, as far as it matters to what it should have.
#[derive(Clone, Copy, Debug)]
pub struct ForNode<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its Node, which says its zone.
    pub object: Option<&'a Node>,
    /// Addresses of Services that it answers itself.
    pub node_local: &'a [IpAddr],
    /// What it has found out of others.
    pub found: &'a Found,
}

/// What a node has found out by itself, and leaves out of Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Names of the nodes that don't answer it.
    pub silent: BTreeSet<String>,
    /// Backends whose connections failed.
    pub ejected: BTreeSet<BackendKeyed>,
}

/// Derives it as the node's own reconciler does.
#[must_use]
pub fn expected(node: ForNode<'_>, service: &Service, slices: &[EndpointSlice]) -> Expected {
    let local = node.node_local.iter().map(|ip| Address::from(*ip)).collect();
    let mut tables = Tables::new(node.name, local);
    if let Some(object) = node.object {
        tables.apply_node(object);
    }
    tables.set_silent(node.found.silent.iter().map(String::as_str));
    tables.set_ejected(node.found.ejected.iter().map(|backend| (*backend).into()).collect());
    let text = json(service);
    let service: wire::Service<'_> = serde_json::from_str(&text).expect("what was written can be read");
    tables.apply_service(&service);
    for text in slices.iter().map(json) {
        tables.apply_slice(&serde_json::from_str(&text).expect("what was written can be read"));
    }
    let Some(found) = service_name(&service).and_then(|name| {
        let (service, slices) = tables.get(&name)?;
        Some(desired(service, &slices, tables.view()))
    }) else {
        return Expected::default();
    };
    let keyed = |key: &weft_ebpf_abi::BackendKey| {
        let protocol = Protocol::from_number(key.protocol)?;
        Some(BackendKeyed { address: key.address.into(), port: key.port.get(), protocol })
    };
    let frontends = found.frontends.iter().filter_map(|(key, frontend)| {
        let list = found.lists.get(frontend.list.as_ref()?);
        let members = list.into_iter().flatten().filter_map(keyed).collect();
        Some((FrontendKey::try_from(*key).ok()?, members))
    });
    Expected {
        frontends: frontends.collect(),
        backends: found.backends.keys().filter_map(keyed).collect(),
        weighted: !found.weights.is_empty(),
        ejected: found.ejected.iter().filter_map(keyed).collect(),
    }
}

/// As the object would come to the node.
fn json(object: &impl Serialize) -> String {
    serde_json::to_string(object).expect("objects of the API have texts for keys")
}

impl Expected {
    /// What the maps lack or have too much; empty if they say what they should.
    #[must_use]
    pub fn differences(&self, found: &[Frontend]) -> Vec<String> {
        let mut out = Vec::new();
        for (key, members) in &self.frontends {
            let Some(frontend) = found.iter().find(|frontend| frontend.key == *key) else {
                out.push(format!("{key} is missing"));
                continue;
            };
            let present: BTreeSet<_> = frontend.backends.iter().map(|backend| backend.key).collect();
            out.extend(members.difference(&present).map(|b| format!("{key} lacks backend {b}")));
            out.extend(present.difference(members).map(|b| format!("{key} still has backend {b}")));
        }
        out
    }
}
