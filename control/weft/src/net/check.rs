//! `weft net check`: small pods on every node ask each other over every way that traffic takes, and are removed again.
//!
//! ```text
//! Services → server pods (each asks itself by its Service: hairpin) → maps of every node have them
//!          → client pods (one script each: pods, Services, NodePorts, names) → their logs → table
//! ```

mod manifest;
mod results;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, LogParams, PostParams};
use weft_agent_dataplane::observe::expected::{ForNode, expected};
use weft_agent_dataplane::observe::probe::Probed;
use weft_agent_dataplane::observe::wire::{Entries, Request};

use super::Said;
use super::args::CheckArgs;
use super::reach::Reach;
use super::why::addresses;
use manifest::{PORT, Place, Target};
use results::{Line, Outcome};

/// Nodes that take part; every one of them asks every other.
const MAX_NODES: usize = 16;
/// Longest wait for one step: pods that start, maps that follow, a script that ends.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that has no events.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// `weft net check`.
pub(crate) async fn check(reach: &Reach, args: &CheckArgs) -> anyhow::Result<Said> {
    let nodes: Vec<Node> = reach.api_nodes().await?.into_iter().filter(is_ready).take(MAX_NODES).collect();
    ensure!(!nodes.is_empty(), "no node is Ready");
    let name = format!("weft-net-check-{:08x}", rand::random::<u32>());
    let api: Api<Namespace> = Api::all(reach.client.clone());
    api.create(&PostParams::default(), &manifest::namespace(&name)?)
        .await
        .context("cannot make a namespace")?;
    let stop = crate::up::shutdown_on_signal()?;
    let checks = Checks { reach, args, namespace: &name, nodes: &nodes };
    let outcome = stop.run_until_cancelled(Box::pin(checks.run())).await;
    if args.keep {
        eprintln!("the pods stay in namespace {name}; remove it with `kubectl delete namespace {name}`");
    } else {
        let removed = api.delete(&name, &DeleteParams::default()).await;
        removed.with_context(|| format!("cannot remove the namespace {name}; remove it by hand"))?;
    }
    let lines = outcome.context("interrupted")??;
    let good = lines.iter().all(|line| line.outcome == Outcome::Ok);
    Said::new(good, args.output, results::render(&lines, nodes.len()), &lines)
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

struct Checks<'a> {
    reach: &'a Reach,
    args: &'a CheckArgs,
    namespace: &'a str,
    nodes: &'a [Node],
}

impl Checks<'_> {
    async fn run(&self) -> anyhow::Result<Vec<Line>> {
        let mut services = Vec::new();
        for index in 0..self.nodes.len() {
            services.push(self.service(&manifest::server_name(index), Some(index)).await?);
        }
        let all = self.service(manifest::ALL, None).await?;
        for (index, service) in services.iter().enumerate() {
            let place = self.place(index);
            self.pod(&manifest::server(&place, cluster_ip(service)?)?).await?;
        }
        let servers = self.wait_ready().await?;
        services.push(all);
        self.wait_programmed(&services).await?;

        let targets = self.targets(&servers, &services)?;
        for index in 0..self.nodes.len() {
            self.pod(&manifest::client(&self.place(index), &targets)?).await?;
        }
        let mut lines = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let log = self.log_of_client(&manifest::client_name(index)).await?;
            lines.extend(results::of_client(&node.name_any(), &targets, &log));
            let hairpin = self.hairpin(&manifest::server_name(index)).await?;
            lines.push(results::hairpin(&node.name_any(), &manifest::server_name(index), hairpin));
        }
        lines.extend(self.asked_by_hosts(&targets));
        lines.sort_by(|a, b| (a.order(), &a.from, &a.to).cmp(&(b.order(), &b.from, &b.to)));
        Ok(lines)
    }

    fn place(&self, index: usize) -> Place<'_> {
        Place { namespace: self.namespace, image: &self.args.image, node: &self.nodes[index], index }
    }

    async fn service(&self, name: &str, index: Option<usize>) -> anyhow::Result<Service> {
        let api: Api<Service> = Api::namespaced(self.reach.client.clone(), self.namespace);
        let object = manifest::service(name, index)?;
        api.create(&PostParams::default(), &object)
            .await
            .with_context(|| format!("cannot make the Service {name}"))
    }

    /// A new namespace takes no pods before it has its service account.
    async fn pod(&self, object: &Pod) -> anyhow::Result<()> {
        let api = self.pods();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match api.create(&PostParams::default(), object).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 403 && Instant::now() < deadline => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot make the pod {}", object.name_any()));
                }
            }
        }
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.reach.client.clone(), self.namespace)
    }

    /// The addresses of the servers, in the order of their nodes.
    async fn wait_ready(&self) -> anyhow::Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let name = manifest::server_name(index);
            let ready = |pod: &Pod| super::why::is_ready(pod).then(|| pod.status.clone()?.pod_ip).flatten();
            let address = self.wait_for(&name, &node.name_any(), ready).await?;
            addresses
                .push(address.parse().with_context(|| format!("pod {name} has the address {address:?}"))?);
        }
        Ok(addresses)
    }

    /// Waits for what `done` takes from a pod; gives up at once on an image that is not there.
    async fn wait_for<T>(
        &self,
        name: &str,
        node: &str,
        done: impl Fn(&Pod) -> Option<T>,
    ) -> anyhow::Result<T> {
        let (api, deadline) = (self.pods(), Instant::now() + PATIENCE);
        loop {
            let pod = api.get(name).await.with_context(|| format!("cannot get the pod {name}"))?;
            if let Some(value) = done(&pod) {
                return Ok(value);
            }
            let cause = super::why::unready_text(&pod);
            ensure!(
                !cause.contains("ErrImageNeverPull"),
                "node {node} has no image {}: import it with `weft image import`, or name another with --image",
                self.args.image
            );
            ensure!(Instant::now() < deadline, "on node {node}, pod {cause} after {} s", PATIENCE.as_secs());
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until the nodes of this machine have the Services with all their backends.
    async fn wait_programmed(&self, services: &[Service]) -> anyhow::Result<()> {
        let (node_local, deadline) = (self.reach.node_local(), Instant::now() + PATIENCE);
        for service in services {
            let name = service.name_any();
            for node in &self.reach.nodes {
                let object = self.nodes.iter().find(|object| object.name_any() == node.name);
                loop {
                    let slices = self.reach.slices(Some(self.namespace), Some(&name)).await?;
                    let found_out = node.found(self.nodes)?;
                    let of_node =
                        ForNode { name: &node.name, object, node_local: &node_local, found: &found_out };
                    let wanted = expected(of_node, service, &slices);
                    let frontends = wanted.frontends.keys().copied().collect();
                    let found: Entries = node.ask(&Request::Entries { frontends, backends: Vec::new() })?;
                    let differences = wanted.differences(&found.frontends);
                    if differences.is_empty() && !wanted.backends.is_empty() {
                        break;
                    }
                    ensure!(
                        Instant::now() < deadline,
                        "node {} has not programmed the Service {name} after {} s: {}",
                        node.name,
                        PATIENCE.as_secs(),
                        differences.join("; ")
                    );
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
            }
        }
        Ok(())
    }

    fn targets(&self, servers: &[IpAddr], services: &[Service]) -> anyhow::Result<Vec<Target>> {
        let mut targets = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            let (name, server) = (node.name_any(), manifest::server_name(index));
            targets.push(Target::pod(&name, SocketAddr::new(servers[index], PORT), &server));
            targets.push(Target::body(&name, SocketAddr::new(servers[index], PORT)));
            let service = SocketAddr::new(cluster_ip(&services[index])?, PORT);
            targets.push(Target::service(&name, service, &server));
            let all = services.last().context("the last Service is that of all")?;
            let ports = all.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
            let port = ports.filter_map(|port| u16::try_from(port.node_port?).ok()).next();
            if let (Some(address), Some(port)) = (addresses(node).first(), port) {
                targets.push(Target::node_port(&name, SocketAddr::new(*address, port)));
            }
        }
        let all = services.last().context("the last Service is that of all")?;
        let name = format!("{}.{}.svc.{}", manifest::ALL, self.namespace, crate::cluster::DOMAIN);
        targets.push(Target::name(&name, cluster_ip(all)?));
        Ok(targets)
    }

    async fn log_of_client(&self, name: &str) -> anyhow::Result<String> {
        let ended = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            matches!(phase, Some("Succeeded" | "Failed")).then_some(())
        };
        self.wait_for(name, "?", ended).await?;
        let log = self.pods().logs(name, &LogParams::default()).await;
        log.with_context(|| format!("cannot read the log of the pod {name}"))
    }

    /// What the server's call of itself came to; it says so in its log once it is over.
    async fn hairpin(&self, name: &str) -> anyhow::Result<Option<String>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.pods().logs(name, &LogParams::default()).await;
            let log = log.with_context(|| format!("cannot read the log of the pod {name}"))?;
            if let Some(said) = results::result_of(&log, "hairpin") {
                return Ok(Some(said.to_owned()));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The nodes' own processes, where the node is on this machine.
    fn asked_by_hosts(&self, targets: &[Target]) -> Vec<Line> {
        let mut lines = Vec::new();
        for node in &self.reach.nodes {
            for target in targets {
                let Some(to) = target.address else { continue };
                let outcome = match node.ask::<Probed>(&Request::Probe { to }) {
                    Ok(Probed::Answer(answer)) => target.judge(Ok(&answer)),
                    Ok(Probed::Failed(error)) => target.judge(Err(&error)),
                    Err(error) => target.judge(Err(&format!("{error:#}"))),
                };
                lines.push(results::from_host(&node.name, target, outcome));
            }
        }
        lines
    }
}

fn cluster_ip(service: &Service) -> anyhow::Result<IpAddr> {
    let ip = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref());
    match ip.map(str::parse) {
        Some(Ok(address)) => Ok(address),
        _ => bail!("the Service {} got no address", service.name_any()),
    }
}
