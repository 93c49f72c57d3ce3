//! `weft service show`: one Service, entry by entry, on every node.

use std::collections::BTreeMap;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use kube::ResourceExt as _;
use serde::Serialize;
use weft_agent_dataplane::observe::expected::{Expected, ForNode, expected};
use weft_agent_dataplane::observe::wire::{Backend, BackendKeyed, Entries, Frontend, Request, Scope};

use crate::net::args::ShowArgs;
use crate::net::endpoints::{self, Endpoint};
use crate::net::reach::{NodeHandle, Reach};
use crate::net::table::{Table, or_none};
use crate::net::{Said, service};

/// A Service and what the nodes hold of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    namespace: String,
    name: String,
    r#type: String,
    cluster_ips: Vec<String>,
    external_ips: Vec<String>,
    ports: Vec<String>,
    internal_traffic_policy: String,
    external_traffic_policy: Option<String>,
    session_affinity: String,
    endpoints: Vec<ShownEndpoint>,
    nodes: BTreeMap<String, OnNode>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ShownEndpoint {
    #[serde(flatten)]
    key: BackendKeyed,
    #[serde(flatten)]
    endpoint: Endpoint,
}

/// What a node holds.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct OnNode {
    /// Everything is as it should be.
    programmed: bool,
    /// What is not.
    differences: Vec<String>,
    frontends: Vec<Frontend>,
    backends: Vec<Backend>,
    /// Endpoints that would take traffic, and why they don't here.
    left_out: Vec<LeftOut>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LeftOut {
    #[serde(flatten)]
    key: BackendKeyed,
    reason: String,
}

/// `weft service show`.
pub(crate) async fn show(reach: &Reach, args: &ShowArgs) -> anyhow::Result<Said> {
    let (namespace, name) = args.service.split_once('/').unwrap_or((&args.namespace, &args.service));
    let object = reach.service(namespace, name).await?;
    let object = object.with_context(|| format!("there is no Service {namespace}/{name}"))?;
    let slices = reach.slices(Some(namespace), Some(name)).await?;
    let (node_local, api_nodes) = (reach.node_local(), reach.api_nodes().await?);
    let endpoints = endpoints::by_address(&slices);
    let mut nodes = BTreeMap::new();
    for node in &reach.nodes {
        let of_api = api_nodes.iter().find(|known| known.name_any() == node.name);
        let found = node.found(&api_nodes)?;
        let of_node = ForNode { name: &node.name, object: of_api, node_local: &node_local, found: &found };
        let wanted = expected(of_node, &object, &slices);
        let left_out = endpoints::left_out(&endpoints, &found.silent, &wanted.ejected).into_iter();
        let left_out = left_out.map(|(key, reason)| LeftOut { key, reason }).collect();
        nodes.insert(node.name.clone(), OnNode { left_out, ..on_node(node, &wanted) });
    }
    let spec = object.spec.clone().unwrap_or_default();
    let shown = Shown {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        r#type: spec.type_.clone().unwrap_or_else(|| "ClusterIP".to_owned()),
        cluster_ips: spec.cluster_ips.clone().unwrap_or_default(),
        external_ips: service::external_ips(&object),
        ports: service::ports(&object),
        internal_traffic_policy: spec.internal_traffic_policy.clone().unwrap_or_else(|| "Cluster".to_owned()),
        external_traffic_policy: spec.external_traffic_policy.clone(),
        session_affinity: affinity(&spec),
        endpoints: endpoints.into_iter().map(|(key, endpoint)| ShownEndpoint { key, endpoint }).collect(),
        nodes,
    };
    let all = shown.nodes.values().all(|node| node.programmed);
    Said::new(all, args.output, render(&shown, &object), &shown)
}

fn on_node(node: &NodeHandle, wanted: &Expected) -> OnNode {
    let request = Request::Entries {
        frontends: wanted.frontends.keys().copied().collect(),
        backends: wanted.backends.iter().copied().collect(),
    };
    match node.ask::<Entries>(&request) {
        Ok(entries) => {
            let differences = wanted.differences(&entries.frontends);
            OnNode {
                programmed: differences.is_empty(),
                differences,
                frontends: entries.frontends,
                backends: entries.backends,
                left_out: Vec::new(),
            }
        }
        Err(error) => OnNode { differences: vec![format!("{error:#}")], ..OnNode::default() },
    }
}

fn affinity(spec: &ServiceSpec) -> String {
    let kind = spec.session_affinity.clone().unwrap_or_else(|| "None".to_owned());
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    match config.and_then(|config| config.timeout_seconds).filter(|_| kind == "ClientIP") {
        Some(seconds) => format!("{kind} ({seconds}s)"),
        None => kind,
    }
}

fn render(shown: &Shown, object: &Service) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{:<26}{value}\n", format!("{name}:")));
    line("Name", format!("{}/{}", shown.namespace, shown.name));
    line("Type", shown.r#type.clone());
    line("IPs", or_none(shown.cluster_ips.join(",")));
    line("External IPs", or_none(shown.external_ips.join(",")));
    line("Ports", or_none(shown.ports.join(",")));
    line("Internal Traffic Policy", shown.internal_traffic_policy.clone());
    if let Some(policy) = &shown.external_traffic_policy {
        line("External Traffic Policy", policy.clone());
    }
    line("Session Affinity", shown.session_affinity.clone());
    let current = shown.nodes.values().filter(|node| node.programmed).count();
    let generation = object.metadata.resource_version.as_deref().unwrap_or("?");
    line(
        "Programmed",
        format!("on {current} of {} nodes at resource version {generation}", shown.nodes.len()),
    );
    for (node, held) in &shown.nodes {
        for difference in &held.differences {
            text.push_str(&format!("  {node}: {difference}\n"));
        }
        for LeftOut { key, reason } in &held.left_out {
            text.push_str(&format!("  {node}: {key}/{} is left out: {reason}\n", key.protocol));
        }
    }
    text.push('\n');
    text.push_str(&frontends(shown));
    text.push('\n');
    text.push_str(&backends(shown));
    text
}

fn frontends(shown: &Shown) -> String {
    let mut table = Table::new(&["NODE", "ADDRESS", "CLIENTS", "LIST", "BACKENDS", "AFFINITY", "FLAGS"]);
    for (node, held) in &shown.nodes {
        for frontend in &held.frontends {
            let affinity = match frontend.affinity_seconds {
                0 => "<none>".to_owned(),
                seconds => format!("{seconds}s"),
            };
            table.row([
                node.clone(),
                frontend.key.to_string(),
                match frontend.key.scope {
                    Scope::Inside => "inside".to_owned(),
                    Scope::Outside => "outside".to_owned(),
                },
                frontend.list.to_string(),
                frontend.backends.len().to_string(),
                affinity,
                or_none(frontend.flags.join(",")),
            ]);
        }
    }
    if table.is_empty() { "The kernel has nothing of it on any node.\n".to_owned() } else { table.render() }
}

fn backends(shown: &Shown) -> String {
    let heading = ["NODE", "BACKEND", "STATE", "GENERATION", "ENDPOINT", "POD", "ON", "SLICE"];
    let mut table = Table::new(&heading);
    for (node, held) in &shown.nodes {
        for backend in &held.backends {
            let endpoint = shown.endpoints.iter().find(|known| known.key == backend.key);
            let endpoint = endpoint.map(|known| &known.endpoint);
            let of =
                |get: fn(&Endpoint) -> Option<String>| or_none(endpoint.and_then(get).unwrap_or_default());
            table.row([
                node.clone(),
                format!("{}/{}", backend.key, backend.key.protocol),
                match backend.active {
                    true => "active".to_owned(),
                    false if held.left_out.iter().any(|one| one.key == backend.key) => "left out".to_owned(),
                    false => "draining".to_owned(),
                },
                backend.generation.to_string(),
                endpoint.map_or("gone", Endpoint::state).to_owned(),
                of(|endpoint| endpoint.pod.clone()),
                of(|endpoint| endpoint.node.clone()),
                of(|endpoint| Some(endpoint.slice.clone())),
            ]);
        }
    }
    if table.is_empty() { "It has no endpoints.\n".to_owned() } else { table.render() }
}
