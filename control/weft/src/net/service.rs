//! `weft service`: what the kernels of the nodes hold of the Services, beside what they should.

mod one;

use std::collections::{BTreeMap, HashMap};

use anyhow::ensure;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt as _;
use serde::Serialize;
use weft_agent_dataplane::observe::expected::{Expected, ForNode, Found, expected};
use weft_agent_dataplane::observe::wire::{Frontend, FrontendKey, Request};

use super::args::ListArgs;
use super::reach::Reach;
use super::table::{Table, or_none};
use super::{Said, endpoints};

pub(crate) use one::show;

/// A line of `weft service list`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    namespace: String,
    name: String,
    r#type: String,
    cluster_ips: Vec<String>,
    external_ips: Vec<String>,
    ports: Vec<String>,
    /// Endpoints that take new connections, and all.
    ready: usize,
    endpoints: usize,
    /// Whether the kernel has anything of it: a headless Service is a matter of names alone.
    in_kernel: bool,
    /// Nodes whose maps have all its addresses, with as many backends as they should.
    programmed: Vec<String>,
    /// Nodes that lag behind, and what they lack.
    behind: BTreeMap<String, String>,
}

/// What the nodes have; one that could not be asked has an error instead.
type Held = BTreeMap<String, Result<OfNode, String>>;

/// What a node has, by address and port, and what it has found out of others.
struct OfNode {
    frontends: HashMap<FrontendKey, Frontend>,
    found: Found,
}

/// `weft service list`.
pub(crate) async fn list(reach: &Reach, args: &ListArgs) -> anyhow::Result<Said> {
    let rows = rows(reach, args.namespace.as_deref()).await?;
    let all = rows.iter().all(|row| row.behind.is_empty());
    Said::new(all, args.output, render(&rows, reach.nodes.len()), &rows)
}

/// How many Services there are, and which of them are not on every node.
pub(crate) async fn listing(reach: &Reach) -> anyhow::Result<(usize, Vec<String>)> {
    let rows = rows(reach, None).await?;
    let behind = rows.iter().filter(|row| !row.behind.is_empty());
    Ok((rows.len(), behind.map(|row| format!("{}/{}", row.namespace, row.name)).collect()))
}

async fn rows(reach: &Reach, namespace: Option<&str>) -> anyhow::Result<Vec<Listed>> {
    let (services, slices) = (reach.services(namespace).await?, reach.slices(namespace, None).await?);
    let nodes = reach.api_nodes().await?;
    let mut of_service: HashMap<(String, String), Vec<EndpointSlice>> = HashMap::new();
    for slice in slices {
        let owner = slice.labels().get("kubernetes.io/service-name").cloned();
        if let (Some(owner), Some(namespace)) = (owner, slice.namespace()) {
            of_service.entry((namespace, owner)).or_default().push(slice);
        }
    }
    let held: Held = reach.nodes.iter().map(|node| (node.name.clone(), held(node, &nodes))).collect();
    let errors: Vec<&str> =
        held.values().filter_map(|node| node.as_ref().err()).map(String::as_str).collect();
    ensure!(errors.len() < held.len(), "no node of this machine has a dataplane: {}", errors.join("; "));
    let none = Vec::new();
    let row = |service: &Service| {
        let key = (service.namespace().unwrap_or_default(), service.name_any());
        listed((reach, &nodes), service, of_service.get(&key).unwrap_or(&none), &held)
    };
    Ok(services.iter().map(row).collect())
}

fn held(node: &super::reach::NodeHandle, nodes: &[Node]) -> Result<OfNode, String> {
    let failed = |error: anyhow::Error| format!("{error:#}");
    let frontends: Vec<Frontend> = node.ask(&Request::Frontends).map_err(failed)?;
    let frontends = frontends.into_iter().map(|frontend| (frontend.key, frontend)).collect();
    Ok(OfNode { frontends, found: node.found(nodes).map_err(failed)? })
}

fn listed(
    (reach, nodes): (&Reach, &[Node]),
    service: &Service,
    slices: &[EndpointSlice],
    held: &Held,
) -> Listed {
    let spec = service.spec.clone().unwrap_or_default();
    let endpoints = endpoints::by_address(slices);
    let node_local = reach.node_local();
    let (mut programmed, mut behind) = (Vec::new(), BTreeMap::new());
    let mut in_kernel = false;
    let nothing = Found::default();
    for (node, held) in held {
        let object = nodes.iter().find(|object| object.name_any() == *node);
        let found = held.as_ref().map_or(&nothing, |held| &held.found);
        let of_node = ForNode { name: node, object, node_local: &node_local, found };
        let wanted = expected(of_node, service, slices);
        if wanted.frontends.is_empty() {
            continue;
        }
        in_kernel = true;
        let lacks = match held {
            Ok(held) => shortfall(&wanted, &held.frontends),
            Err(error) => Some(error.clone()),
        };
        match lacks {
            None => programmed.push(node.clone()),
            Some(lacks) => drop(behind.insert(node.clone(), lacks)),
        }
    }
    Listed {
        namespace: service.namespace().unwrap_or_default(),
        name: service.name_any(),
        r#type: spec.type_.clone().unwrap_or_else(|| "ClusterIP".to_owned()),
        cluster_ips: spec
            .cluster_ips
            .clone()
            .or(spec.cluster_ip.clone().map(|ip| vec![ip]))
            .unwrap_or_default(),
        external_ips: external_ips(service),
        ports: ports(service),
        ready: endpoints.values().filter(|endpoint| endpoint.ready).count(),
        endpoints: endpoints.len(),
        in_kernel,
        programmed,
        behind,
    }
}

/// The first thing that the maps lack, by the number of backends alone: lists are not read for an overview.
fn shortfall(wanted: &Expected, frontends: &HashMap<FrontendKey, Frontend>) -> Option<String> {
    wanted.frontends.iter().find_map(|(key, members)| {
        let Some(found) = frontends.get(key) else { return Some(format!("{key} is missing")) };
        // A table has many places for each backend.
        let hashed = wanted.weighted || found.flags.iter().any(|flag| flag == "hashed");
        let fits = if hashed {
            (found.count > 0) != members.is_empty()
        } else {
            found.count as usize == members.len()
        };
        (!fits).then(|| format!("{key} has {} backends instead of {}", found.count, members.len()))
    })
}

/// External addresses, and those that a load balancer gave.
pub(crate) fn external_ips(service: &Service) -> Vec<String> {
    let listed = service.spec.iter().flat_map(|spec| spec.external_ips.iter().flatten().cloned());
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.into_iter().flat_map(|balancer| balancer.ingress.iter().flatten());
    listed.chain(ingress.filter_map(|i| i.ip.clone().or(i.hostname.clone()))).collect()
}

/// Ports as `kubectl get service` writes them.
pub(crate) fn ports(service: &Service) -> Vec<String> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let text = |port: &k8s_openapi::api::core::v1::ServicePort| {
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        match port.node_port.filter(|port| *port != 0) {
            Some(node_port) => format!("{}:{node_port}/{protocol}", port.port),
            None => format!("{}/{protocol}", port.port),
        }
    };
    ports.map(text).collect()
}

fn render(rows: &[Listed], nodes: usize) -> String {
    let heading =
        ["NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "ENDPOINTS", "PROGRAMMED"];
    let mut table = Table::new(&heading);
    for row in rows {
        let programmed = match row.in_kernel {
            true => format!("{}/{nodes}", row.programmed.len()),
            false => "-".to_owned(),
        };
        table.row([
            row.namespace.clone(),
            row.name.clone(),
            row.r#type.clone(),
            or_none(row.cluster_ips.join(",")),
            or_none(row.external_ips.join(",")),
            or_none(row.ports.join(",")),
            format!("{}/{}", row.ready, row.endpoints),
            programmed,
        ]);
    }
    if table.is_empty() {
        return "No Services found.\n".to_owned();
    }
    let mut text = table.render();
    for row in rows {
        for (node, lacks) in &row.behind {
            text.push_str(&format!("{}/{} on {node}: {lacks}\n", row.namespace, row.name));
        }
    }
    text
}
