//! `weft why`: the way of a connection, step by step: names, the programs' own decision on the live maps, routes, listeners.
//!
//! ```text
//! ends (API) → the node that sees the client: its maps → a backend → route → the backend's node: delivery, listener → return
//! ```

mod cause;
mod decide;
mod ends;
mod legs;
mod report;

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Node, Service};
use kube::ResourceExt as _;
use weft_agent_dataplane::observe::wire::{BackendKeyed, Protocol};
use weft_agent_dataplane::why::Hook;

pub(super) use cause::{is_ready, unready_text};
pub(super) use ends::addresses;

use super::Said;
use super::args::WhyArgs;
use super::endpoints::Endpoint;
use super::reach::{NodeHandle, Reach};
use ends::{Finder, PodEnd, PortName, Source, Target};
use legs::{Destination, Sender};
use report::{Outcome, Report, Step};

/// Backends whose ways are looked at; those of one node share all but the listener.
const MAX_BACKENDS: usize = 16;

/// A question in progress.
struct Why<'a> {
    reach: &'a Reach,
    nodes: Vec<Node>,
    source: Source,
    protocol: Protocol,
    report: Report,
    /// Of each way, whether it works.
    ways: Vec<bool>,
}

/// An address and port that the client asks for, at a node that sees it.
struct Attempt<'a> {
    node: &'a NodeHandle,
    to: IpAddr,
    port: u16,
    /// The Service that it should be, with what is known of its endpoints.
    service: Option<&'a Known>,
}

/// A Service and its endpoints, as the API has them.
struct Known {
    object: Service,
    slices: Vec<k8s_openapi::api::discovery::v1::EndpointSlice>,
    endpoints: BTreeMap<BackendKeyed, Endpoint>,
}

impl Known {
    fn name(&self) -> String {
        format!("{}/{}", self.object.namespace().unwrap_or_default(), self.object.name_any())
    }

    fn object_name(&self) -> String {
        format!("Service {}", self.name())
    }
}

/// Runs the command.
pub(crate) async fn why(reach: &Reach, args: &WhyArgs) -> anyhow::Result<Said> {
    let nodes = reach.api_nodes().await?;
    let finder = Finder { reach, nodes: &nodes, namespace: &args.namespace };
    let source = finder.source(&args.from).await?;
    let (to, port) = ends::split_port(&args.to)?;
    let home = match &source {
        Source::Pod(pod) => pod.pod.namespace().unwrap_or_default(),
        Source::Node { .. } | Source::Outside(_) => args.namespace.clone(),
    };
    let target = finder.target(&to, &home).await?;
    let described = match &target {
        Target::Service(service) => {
            format!("Service {}/{}:{port}", service.namespace().unwrap_or_default(), service.name_any())
        }
        Target::Pod(pod) => format!("pod {}:{port}", pod.name()),
        Target::Node { name, .. } => format!("node {name}:{port}"),
        Target::Address(IpAddr::V6(address)) => format!("[{address}]:{port}"),
        Target::Address(address) => format!("{address}:{port}"),
        Target::Nothing { name, .. } => format!("{name}:{port}"),
    };
    let report = Report::new(source.describe(), described, args.protocol.to_string());
    let mut why = Why { reach, nodes, source, protocol: args.protocol, report, ways: Vec::new() };
    if why.client_is_there() {
        why.toward(&target, &port).await?;
    }
    let ways = std::mem::take(&mut why.ways);
    why.report.conclude(&ways);
    let reachable = why.report.outcome == Outcome::Reachable;
    Said::new(reachable, args.output, why.report.render(), &why.report)
}

impl<'a> Why<'a> {
    /// A pod without node or address connects nowhere.
    fn client_is_there(&mut self) -> bool {
        let Source::Pod(pod) = &self.source else { return true };
        if pod.node().is_some() && pod.address().is_some() {
            return true;
        }
        let says = format!("the client has no address yet: {}", cause::unready_text(&pod.pod));
        let object = format!("Pod {}", pod.name());
        self.report.push(Step::fail("client", says).by(object));
        false
    }

    async fn toward(&mut self, target: &Target, port: &PortName) -> anyhow::Result<()> {
        match target {
            Target::Service(service) => self.toward_service(service, port).await,
            Target::Pod(pod) => self.toward_pod(pod, port).await,
            Target::Node { address, .. } | Target::Address(address) => {
                self.toward_address(*address, port).await
            }
            Target::Nothing { kind, name } => {
                self.report.push(Step::fail("name", format!("there is no {kind} {name}")));
                Ok(())
            }
        }
    }

    async fn toward_pod(&mut self, pod: &PodEnd, port: &PortName) -> anyhow::Result<()> {
        let object = format!("Pod {}", pod.name());
        let Some(address) = pod.address() else {
            let says = format!("the pod has no address: {}", cause::unready_text(&pod.pod));
            self.report.push(Step::fail("name", says).by(object));
            return Ok(());
        };
        let port = ends::pod_port(pod, port)?;
        self.report.push(Step::ok("name", format!("the pod is at {address}")).by(object));
        for node in self.seen_by(address)? {
            self.attempt(&Attempt { node, to: address, port, service: None }).await?;
        }
        Ok(())
    }

    async fn toward_address(&mut self, address: IpAddr, port: &PortName) -> anyhow::Result<()> {
        let PortName::Number(port) = port else {
            anyhow::bail!("an address has no named ports; write the number")
        };
        for node in self.seen_by(address)? {
            self.attempt(&Attempt { node, to: address, port: *port, service: None }).await?;
        }
        Ok(())
    }

    /// The nodes that see the client's packets to an address first. From outside any may be the first, unless the
    /// address is a node's own.
    fn seen_by(&self, address: IpAddr) -> anyhow::Result<Vec<&'a NodeHandle>> {
        let reach = self.reach;
        match &self.source {
            Source::Pod(pod) => Ok(vec![reach.node(pod.node().unwrap_or_default())?]),
            Source::Node { name, .. } => Ok(vec![reach.node(name)?]),
            Source::Outside(_) => match ends::node_at(&self.nodes, address) {
                Some(name) => Ok(vec![reach.node(&name)?]),
                None => Ok(reach.nodes.iter().collect()),
            },
        }
    }

    fn hook(&self) -> Hook {
        match &self.source {
            Source::Pod(pod) if !pod.host_network() => Hook::PodSocket,
            Source::Pod(_) | Source::Node { .. } => Hook::NodeSocket,
            Source::Outside(_) => Hook::Edge,
        }
    }

    /// Who gets the answers. From outside it is the first node, which sends in its own name, unless the Service keeps
    /// the client's address.
    fn sender<'n>(&self, node: &'n NodeHandle, keeps_source: bool) -> Sender<'n> {
        match &self.source {
            Source::Pod(pod) if !pod.host_network() => {
                Sender { node, address: pod.address(), pod: pod.address() }
            }
            Source::Pod(_) | Source::Node { .. } => Sender { node, address: None, pod: None },
            Source::Outside(address) => Sender { node, address: keeps_source.then_some(*address), pod: None },
        }
    }

    /// What is known of an address that a packet ends at.
    async fn destination(
        &self,
        key: BackendKeyed,
        endpoint: Option<&Endpoint>,
    ) -> anyhow::Result<Destination> {
        let pod = match endpoint.and_then(|endpoint| endpoint.pod.as_deref()) {
            Some(name) => match name.split_once('/') {
                Some((namespace, name)) => self.reach.pod(namespace, name).await?,
                None => None,
            },
            None => self
                .reach
                .pods_at(key.address)
                .await?
                .into_iter()
                .find(|pod| pod.spec.as_ref().is_none_or(|spec| spec.host_network != Some(true))),
        };
        let pod = pod.map(|pod| PodEnd { pod: Box::new(pod) });
        let named = endpoint.and_then(|endpoint| endpoint.node.clone());
        let of_pod = pod.as_ref().and_then(|pod| pod.node().map(str::to_owned));
        Ok(Destination {
            key,
            host_network: pod.as_ref().is_some_and(PodEnd::host_network),
            node: named.or(of_pod).or_else(|| ends::node_at(&self.nodes, key.address)),
            pod: pod.map(|pod| (pod.name(), pod.uid())),
        })
    }
}
