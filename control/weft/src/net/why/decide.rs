//! What a node decides about an address: the programs' own answer, explained by the API's objects.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service, ServicePort};
use kube::ResourceExt as _;
use weft_agent_dataplane::observe::expected::{Expected, ForNode, expected};
use weft_agent_dataplane::observe::wire::{Backend, BackendKeyed, Frontend, Request};
use weft_agent_dataplane::why::{Decision, Hook, Query, Trace};

use super::ends::{self, PortName, Source};
use super::report::Step;
use super::{Attempt, Known, MAX_BACKENDS, Why, cause};
use crate::net::endpoints;
use crate::net::reach::NodeHandle;
use crate::net::service::external_ips;

impl Why<'_> {
    /// A Service by its name: which address of it the client uses follows from where the client is.
    pub(super) async fn toward_service(&mut self, object: &Service, port: &PortName) -> anyhow::Result<()> {
        let known = self.known(object.clone()).await?;
        let spec = object.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") {
            let says = format!(
                "its name leads to {}, outside the cluster: ask about that name's addresses",
                spec.external_name.as_deref().unwrap_or("?")
            );
            self.report.push(Step::fail("name", says).by(known.object_name()));
            return Ok(());
        }
        let number = match self.number(&known, port) {
            Ok(number) => number,
            Err(says) => {
                self.report.push(Step::fail("name", says).by(known.object_name()));
                return Ok(());
            }
        };
        let listed: Vec<IpAddr> =
            spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
        if listed.is_empty() {
            return self.toward_headless(&known, number).await;
        }
        if self.hook() == Hook::Edge {
            return self.outside_in(&known, number).await;
        }
        let says = format!("{}.{} is {}", object.name_any(), domain(object), listed[0]);
        self.report.push(Step::ok("name", says).by(known.object_name()));
        for node in self.seen_by(listed[0])? {
            let attempt = Attempt { node, to: listed[0], port: number, service: Some(&known) };
            self.attempt(&attempt).await?;
        }
        Ok(())
    }

    /// What a node should have of a Service.
    fn expected(&self, node: &NodeHandle, known: &Known) -> anyhow::Result<Expected> {
        let object = self.nodes.iter().find(|object| object.name_any() == node.name);
        let (node_local, found) = (self.reach.node_local(), node.found(&self.nodes)?);
        let of_node = ForNode { name: &node.name, object, node_local: &node_local, found: &found };
        Ok(expected(of_node, &known.object, &known.slices))
    }

    async fn known(&self, object: Service) -> anyhow::Result<Known> {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let slices = self.reach.slices(Some(&namespace), Some(&name)).await?;
        let endpoints = endpoints::by_address(&slices);
        Ok(Known { object, slices, endpoints })
    }

    /// The number of a Service's port; a number stands for itself, so that the maps say what becomes of a wrong one.
    fn number(&self, known: &Known, port: &PortName) -> Result<u16, String> {
        let name = match port {
            PortName::Number(number) => return Ok(*number),
            PortName::Name(name) => name,
        };
        let mut ports = known.object.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let found = ports.find(|port| port.name.as_deref() == Some(name));
        let number = found.and_then(|port| u16::try_from(port.port).ok());
        number.ok_or_else(|| {
            format!("the Service has no port of the name {name}; it has {}", port_list(&known.object))
        })
    }

    /// The name of a headless Service is the addresses of its ready endpoints; the kernel knows nothing of it.
    async fn toward_headless(&mut self, known: &Known, port: u16) -> anyhow::Result<()> {
        let mut addresses: Vec<IpAddr> = known
            .endpoints
            .iter()
            .filter(|(_, endpoint)| endpoint.ready)
            .map(|(key, _)| key.address)
            .collect();
        addresses.dedup();
        if addresses.is_empty() {
            let pods = self.selected(known).await?;
            let mut step = cause::no_endpoints(&known.object, None, &pods);
            step.name = "name";
            self.report.push(step);
            return Ok(());
        }
        let says =
            format!("it is headless: its name is the addresses of its {} ready endpoints", addresses.len());
        self.report.push(Step::ok("name", says).by(known.object_name()));
        for address in addresses.into_iter().take(MAX_BACKENDS) {
            for node in self.seen_by(address)? {
                self.attempt(&Attempt { node, to: address, port, service: None }).await?;
            }
        }
        Ok(())
    }

    /// From outside a Service has its load balancer's and external addresses, or a port on every node.
    async fn outside_in(&mut self, known: &Known, port: u16) -> anyhow::Result<()> {
        let external: Vec<IpAddr> =
            external_ips(&known.object).iter().filter_map(|ip| ip.parse().ok()).collect();
        if let Some(address) = external.first() {
            self.report
                .push(Step::ok("name", format!("from outside it is {address}")).by(known.object_name()));
            for node in self.seen_by(*address)? {
                self.attempt(&Attempt { node, to: *address, port, service: Some(known) }).await?;
            }
            return Ok(());
        }
        let mut ports = known.object.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let node_port = ports
            .find(|p| i32::from(port) == p.port && protocol_of(p) == self.protocol.to_string())
            .and_then(|port| port.node_port)
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port != 0);
        let Some(node_port) = node_port else {
            let says = format!(
                "it has no address outside the cluster: no external address, and no NodePort for port {port}/{}",
                self.protocol
            );
            self.report.push(Step::fail("name", says).by(known.object_name()));
            return Ok(());
        };
        let says = format!("from outside it is port {node_port} of every node");
        self.report.push(Step::ok("name", says).by(known.object_name()));
        let nodes = self.reach.nodes.iter();
        for node in nodes {
            let object = self.nodes.iter().find(|object| object.name_any() == node.name);
            let Some(to) = object.and_then(|object| ends::addresses(object).first().copied()) else {
                continue;
            };
            self.attempt(&Attempt { node, to, port: node_port, service: Some(known) }).await?;
        }
        Ok(())
    }

    /// Asks a node, and follows the packet as far as it comes.
    pub(super) async fn attempt(&mut self, attempt: &Attempt<'_>) -> anyhow::Result<()> {
        let node = attempt.node;
        let (from, pod_uid) = match &self.source {
            Source::Pod(pod) => {
                (pod.address().unwrap_or(attempt.to), pod.uid().filter(|_| !pod.host_network()))
            }
            Source::Node { address, .. } | Source::Outside(address) => (*address, None),
        };
        let (hook, protocol) = (self.hook(), self.protocol);
        let query = Query { hook, from, pod_uid, to: attempt.to, port: attempt.port, protocol };
        let trace: Trace = node.ask(&Request::Why(query))?;
        if !trace.configured {
            let says =
                "the node's programs are not told their node yet: its agent has not started, or not finished";
            self.report.push(Step::fail("service", says).on(&node.name));
            self.ways.push(false);
            return Ok(());
        }
        let found;
        let known = match (attempt.service, &trace.service) {
            (Some(known), _) => Some(known),
            (None, Some(frontend)) => {
                found = self.owner(frontend).await?;
                found.as_ref()
            }
            (None, None) => None,
        };
        let works = match (&trace.decision, &trace.service) {
            (Decision::Backend { kept }, Some(frontend)) => {
                self.toward_backends(attempt, known, (frontend, *kept), &trace.direct).await?;
                return Ok(());
            }
            (Decision::Refused { reason } | Decision::Dropped { reason }, Some(frontend)) => {
                self.service_step(attempt, known, frontend)?;
                self.empty(attempt, known, reason).await?;
                false
            }
            (Decision::Refused { .. } | Decision::Dropped { .. }, None) => {
                self.unknown_port(attempt, &trace).await?;
                false
            }
            (Decision::Direct | Decision::Backend { .. }, _) => self.direct(attempt, known, &trace).await?,
        };
        self.ways.push(works);
        Ok(())
    }

    /// No Service has the address and port here. For a Service's own address that is a node that lags behind.
    async fn direct(
        &mut self,
        attempt: &Attempt<'_>,
        known: Option<&Known>,
        trace: &Trace,
    ) -> anyhow::Result<bool> {
        let node = attempt.node;
        let answered_here = self.reach.node_local().contains(&attempt.to);
        if let Some(known) = known.filter(|_| !answered_here) {
            let wanted = self.expected(node, known)?;
            let says = if wanted.frontends.is_empty() {
                "no node carries it in its kernel".to_owned()
            } else {
                format!("the node has not programmed {}:{}/{} yet", attempt.to, attempt.port, self.protocol)
            };
            self.report.push(Step::fail("service", says).on(&node.name).by(known.object_name()));
            return Ok(false);
        }
        let says = match (answered_here, trace.node_address) {
            (true, _) => format!("{} is answered by each node itself", attempt.to),
            (false, true) => format!("{}:{}/{} is no NodePort", attempt.to, attempt.port, self.protocol),
            (false, false) => format!("{}:{}/{} is no Service", attempt.to, attempt.port, self.protocol),
        };
        self.report.push(Step::ok("service", says).on(&node.name));
        let key = BackendKeyed { address: attempt.to, port: attempt.port, protocol: self.protocol };
        let mut destination = self.destination(key, None).await?;
        if answered_here {
            destination.node = Some(node.name.clone());
        }
        self.way(self.sender(node, false), &destination).await
    }

    fn service_step(
        &mut self,
        attempt: &Attempt<'_>,
        known: Option<&Known>,
        frontend: &Frontend,
    ) -> anyhow::Result<()> {
        let count = frontend.backends.len();
        let plural = if count == 1 { "" } else { "s" };
        let mut says = format!("{} is list {} with {count} backend{plural}", frontend.key, frontend.list);
        if frontend.affinity_seconds > 0 {
            says.push_str(&format!(", a client stays with one for {} s", frontend.affinity_seconds));
        }
        if !frontend.flags.is_empty() {
            says.push_str(&format!(" ({})", frontend.flags.join(", ")));
        }
        let step = Step::ok("service", says).on(&attempt.node.name);
        self.report.push(step.by(known.map(Known::object_name)));
        let Some(known) = known else { return Ok(()) };
        let wanted = self.expected(attempt.node, known)?;
        let found = std::slice::from_ref(frontend);
        let behind =
            wanted.differences(found).into_iter().filter(|text| text.starts_with(&frontend.key.to_string()));
        for says in behind.filter(|text| !text.ends_with("is missing")) {
            let says = format!("the node lags behind the API: {says}");
            self.report.push(Step::note("service", says).on(&attempt.node.name));
        }
        let silent = attempt.node.silent(&self.nodes)?;
        for (key, reason) in endpoints::left_out(&known.endpoints, &silent, &wanted.ejected) {
            let says = format!("{key} is left out: {reason}");
            self.report.push(Step::note("backend", says).on(&attempt.node.name));
        }
        Ok(())
    }

    /// Each backend is a way of its own.
    async fn toward_backends(
        &mut self,
        attempt: &Attempt<'_>,
        known: Option<&Known>,
        (frontend, kept): (&Frontend, Option<BackendKeyed>),
        direct: &[BackendKeyed],
    ) -> anyhow::Result<()> {
        self.service_step(attempt, known, frontend)?;
        let chosen: Vec<&Backend> = match kept {
            Some(kept) => frontend.backends.iter().filter(|backend| backend.key == kept).collect(),
            None => frontend.backends.iter().collect(),
        };
        let endpoint = |backend: &Backend| known.and_then(|known| known.endpoints.get(&backend.key));
        let named: Vec<String> = chosen
            .iter()
            .take(MAX_BACKENDS)
            .map(|backend| match endpoint(backend) {
                Some(endpoint) => {
                    let pod = endpoint.pod.as_deref().unwrap_or("no pod");
                    format!("{} ({pod}, {})", backend.key, endpoint.state())
                }
                None => format!("{} (in no EndpointSlice)", backend.key),
            })
            .collect();
        let how = match (kept, chosen.len()) {
            (Some(_), _) => "the client stays with ".to_owned(),
            (None, 1) => "the only one: ".to_owned(),
            (None, count) if frontend.flags.iter().any(|flag| flag == "hashed") => {
                format!("one of {count}, by a hash of the flow: ")
            }
            (None, count) => format!("one of {count}, at random: "),
        };
        let slice = chosen.first().and_then(|b| endpoint(b)).map(|e| format!("EndpointSlice {}", e.slice));
        let step = Step::ok("backend", how + &named.join(", ")).on(&attempt.node.name);
        self.report.push(step.by(slice));
        let keeps = frontend.flags.iter().any(|flag| flag == "keep-source");
        for backend in chosen.into_iter().take(MAX_BACKENDS) {
            let destination = self.destination(backend.key, endpoint(backend)).await?;
            let is_direct = direct.contains(&backend.key);
            if is_direct {
                let by = destination.node.as_deref().unwrap_or("its node");
                let says =
                    format!("the client keeps its address towards {}, and {by} answers it", backend.key);
                self.report.push(Step::ok("backend", says).on(&attempt.node.name));
            }
            let works = self.way(self.sender(attempt.node, keeps || is_direct), &destination).await?;
            self.ways.push(works);
        }
        Ok(())
    }

    /// The Service has no backend for this client.
    async fn empty(
        &mut self,
        attempt: &Attempt<'_>,
        known: Option<&Known>,
        reason: &str,
    ) -> anyhow::Result<()> {
        let node = &attempt.node.name;
        if reason == "source_not_allowed" {
            let says = "loadBalancerSourceRanges do not name the client: its packets are dropped";
            let step = Step::fail("policy", says).on(node);
            self.report.push(step.by(known.map(Known::object_name)));
            return Ok(());
        }
        let Some(known) = known else {
            let says =
                format!("it has no backend ({reason}), and no Service in the API has this address and port");
            self.report.push(Step::fail("backend", says).on(node));
            return Ok(());
        };
        let ready = |of: Option<&str>| {
            known.endpoints.values().filter(|e| e.ready && (of.is_none() || e.node.as_deref() == of)).count()
        };
        // Those whose connections fail never empty a list.
        let silent = attempt.node.silent(&self.nodes)?;
        let left_out = endpoints::left_out(&known.endpoints, &silent, &BTreeSet::new()).len();
        let step = if left_out > 0 && left_out >= ready(None) {
            let says = "all endpoints that are ready are on nodes that don't answer this one";
            Step::fail("backend", says).by(known.object_name())
        } else if ready(None) > 0 && ready(Some(node)) == 0 {
            let policy =
                if self.hook() == Hook::Edge { "externalTrafficPolicy" } else { "internalTrafficPolicy" };
            let elsewhere: BTreeSet<&str> =
                known.endpoints.values().filter(|e| e.ready).filter_map(|e| e.node.as_deref()).collect();
            let elsewhere = elsewhere.into_iter().collect::<Vec<_>>().join(", ");
            let says =
                format!("{policy} is Local, and this node has no ready endpoint: they are on {elsewhere}");
            Step::fail("backend", says).by(known.object_name())
        } else if ready(None) > 0 {
            let says = "the node lags behind the API: endpoints are ready, and its list is empty";
            Step::fail("backend", says).by(known.object_name())
        } else {
            let pods = self.selected(known).await?;
            cause::no_endpoints(&known.object, self.service_port(known, attempt.port).as_ref(), &pods)
        };
        self.report.push(step.on(node));
        Ok(())
    }

    async fn unknown_port(&mut self, attempt: &Attempt<'_>, trace: &Trace) -> anyhow::Result<()> {
        let found;
        let known = match (attempt.service, trace.served.first()) {
            (Some(known), _) => Some(known),
            (None, Some(key)) => {
                found = self.owner_of(key.address, key.port).await?;
                found.as_ref()
            }
            (None, None) => None,
        };
        let ports = match known {
            Some(known) => port_list(&known.object),
            None => trace
                .served
                .iter()
                .map(|key| format!("{}/{}", key.port, key.protocol))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let says = format!(
            "{} does not serve port {}/{}; it serves {}",
            attempt.to,
            attempt.port,
            self.protocol,
            if ports.is_empty() { "none".to_owned() } else { ports }
        );
        let step = Step::fail("service", says).on(&attempt.node.name);
        self.report.push(step.by(known.map(Known::object_name)));
        Ok(())
    }

    /// Pods that the Service's selector finds.
    async fn selected(&self, known: &Known) -> anyhow::Result<Vec<k8s_openapi::api::core::v1::Pod>> {
        match cause::selector(&known.object) {
            Some(labels) => self.reach.pods(known.object.namespace().as_deref(), &labels).await,
            None => Ok(Vec::new()),
        }
    }

    /// The Service's port of a number: its own, or a NodePort.
    fn service_port(&self, known: &Known, number: u16) -> Option<ServicePort> {
        let mut ports = known.object.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let number = i32::from(number);
        ports.find(|port| port.port == number || port.node_port == Some(number)).cloned()
    }

    async fn owner(&self, frontend: &Frontend) -> anyhow::Result<Option<Known>> {
        self.owner_of(frontend.key.address, frontend.key.port).await
    }

    /// The Service that has an address, or for the unspecified one a NodePort.
    async fn owner_of(&self, address: IpAddr, port: u16) -> anyhow::Result<Option<Known>> {
        let owns = |service: &Service| match address.is_unspecified() {
            false => {
                let listed = service.spec.iter().flat_map(|spec| spec.cluster_ips.iter().flatten().cloned());
                listed.chain(external_ips(service)).any(|ip| ip.parse() == Ok(address))
            }
            true => {
                let mut ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
                ports.any(|candidate| candidate.node_port == Some(i32::from(port)))
            }
        };
        match self.reach.services(None).await?.into_iter().find(owns) {
            Some(service) => Ok(Some(self.known(service).await?)),
            None => Ok(None),
        }
    }
}

fn protocol_of(port: &ServicePort) -> &str {
    port.protocol.as_deref().unwrap_or("TCP")
}

fn domain(service: &Service) -> String {
    format!("{}.svc.{}", service.namespace().unwrap_or_default(), crate::cluster::DOMAIN)
}

/// A Service's ports with their names.
fn port_list(service: &Service) -> String {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let text = |port: &ServicePort| {
        let name = port.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
        format!("{}/{}{name}", port.port, protocol_of(port))
    };
    ports.map(text).collect::<Vec<_>>().join(", ")
}
