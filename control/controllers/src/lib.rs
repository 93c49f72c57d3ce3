//! Owns the controllers: each watches the public API and writes what brings the cluster nearer to what is wanted.
#![forbid(unsafe_code)]

mod claim;
mod deployment;
mod discovery;
mod endpoints;
mod endpointslice;
mod endpointslicemirroring;
mod error;
mod gc;
mod load_balancer;
mod namespace;
mod namespaced;
mod node;
mod pod;
mod programmed;
mod replicaset;
mod servicecidr;
mod shared;

pub use error::Error;
pub use node::ipam::{NODE_PREFIX_V4, NODE_PREFIX_V6};

use ipnetwork::IpNetwork;
use kube::Client;
use shared::Shared;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weft_control_client::leader::{self, Election};
use weft_control_client::recorder;

/// The identity under which the lease is held (`system:kube-controller-manager`).
pub const MANAGER: &str = "kube-controller-manager";

/// The names for which [`run`] asks for a client besides [`MANAGER`]; each is the service account of that name in
/// `kube-system`, with upstream's role. The shared caches are filled by controllers that may read the kind.
pub const CONTROLLERS: &[&str] = &[
    "deployment-controller",
    "replicaset-controller",
    "endpointslice-controller",
    "endpoint-controller",
    "endpointslicemirroring-controller",
    "service-cidrs-controller",
    "service-controller",
    "namespace-controller",
    "generic-garbage-collector",
    "node-controller",
    "node-ipam-controller",
    "service-account-controller",
    "root-ca-cert-publisher",
];

/// How the controllers work.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pod addresses of the whole cluster, one range for each family, the primary family's first; each node gets a /24 (IPv4)
    /// or /64 (IPv6) of each.
    pub cluster_cidrs: Vec<IpNetwork>,
    /// Service addresses, which no node's range may overlap.
    pub service_cidrs: Vec<IpNetwork>,
    /// Where Services of type LoadBalancer get their addresses from; with none, somebody else gives them.
    pub load_balancer_pools: Vec<IpNetwork>,
    /// The cluster CA, published to every namespace.
    pub root_ca_pem: String,
    /// Name under which the lease is held; the same after a restart.
    pub identity: String,
    /// Whether to work only while holding the lease.
    pub leader_election: bool,
    /// How long a node may stay silent before it is unreachable (upstream: 40 s).
    pub node_monitor_grace: Duration,
}

impl Config {
    /// Every mistake in it.
    fn check(&self) -> Result<(), Error> {
        let mut wrong = Vec::new();
        if self.identity.is_empty() {
            wrong.push("the identity is empty".to_owned());
        }
        if !self.root_ca_pem.contains("BEGIN CERTIFICATE") {
            wrong.push("the root CA is not a PEM certificate".to_owned());
        }
        for (what, ranges) in [("pod", &self.cluster_cidrs), ("Service", &self.service_cidrs)] {
            let differ = |a: &IpNetwork, b: &IpNetwork| a.is_ipv6() != b.is_ipv6();
            if !matches!(ranges.as_slice(), [_]) && !matches!(ranges.as_slice(), [a, b] if differ(a, b)) {
                wrong.push(format!("{} {what} ranges, not one for each family", ranges.len()));
            }
        }
        for (pods, services) in
            self.cluster_cidrs.iter().flat_map(|pods| self.service_cidrs.iter().map(move |s| (pods, s)))
        {
            if pods.contains(services.network()) || services.contains(pods.network()) {
                wrong.push(format!("{pods} and {services} overlap"));
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(Error::Config(wrong.join("; "))) }
    }
}

/// Runs all controllers until `shutdown`. `clients` makes the client of a controller by its name.
pub async fn run(
    config: Config,
    clients: impl Fn(&str) -> Client + Send + Sync + 'static,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    config.check()?;
    let start = |term: CancellationToken| lead(&config, &clients, term);
    if !config.leader_election {
        return start(shutdown).await;
    }
    let election =
        Election { namespace: "kube-system".into(), name: MANAGER.into(), identity: config.identity.clone() };
    leader::run(clients(MANAGER), &election, &shutdown, start).await
}

/// Runs all controllers for one term.
async fn lead(
    config: &Config,
    clients: &impl Fn(&str) -> Client,
    term: CancellationToken,
) -> Result<(), Error> {
    let shared = Shared::new();
    let mut tasks = Tasks { set: JoinSet::new(), term: term.clone() };
    tasks.start_workloads(clients, &shared);
    tasks.start_services(clients, &shared, config);
    tasks.start_namespaces(clients, &shared, config);
    tasks.start_nodes(clients, &shared, config);
    let collector = gc::Controller::new(clients("generic-garbage-collector"));
    tasks.spawn(|term| async move { collector.run(&term).await });
    // Last: every controller has its handlers in place before the first object arrives.
    let readers = shared::Readers::new(clients);
    tasks.spawn(|term| async move { Box::pin(shared.run(readers, &term)).await });
    tasks.join().await;
    Ok(())
}

/// The tasks of one term.
struct Tasks {
    set: JoinSet<()>,
    term: CancellationToken,
}

impl Tasks {
    fn spawn<Fut>(&mut self, task: impl FnOnce(CancellationToken) -> Fut)
    where
        Fut: Future<Output = ()> + Send + 'static,
    {
        self.set.spawn(task(self.term.clone()));
    }

    /// A recorder for a component, whose writer runs for the term.
    fn recorder(&mut self, client: &Client, component: &str) -> recorder::Recorder {
        let (recorder, writer) = recorder::recorder(component);
        let client = client.clone();
        self.spawn(|term| writer.run(client, term));
        recorder
    }

    fn start_workloads(&mut self, clients: &impl Fn(&str) -> Client, shared: &Arc<Shared>) {
        let client = clients("deployment-controller");
        let recorder = self.recorder(&client, "deployment-controller");
        let deployments = deployment::Controller::new(client, shared.clone(), recorder);
        self.spawn(|term| async move { deployments.run(&term).await });

        let client = clients("replicaset-controller");
        let recorder = self.recorder(&client, "replicaset-controller");
        let replica_sets = replicaset::Controller::new(client, shared.clone(), recorder);
        self.spawn(|term| async move { replica_sets.run(&term).await });
    }

    fn start_services(&mut self, clients: &impl Fn(&str) -> Client, shared: &Arc<Shared>, config: &Config) {
        let slices = endpointslice::Controller::new(clients("endpointslice-controller"), shared.clone());
        self.spawn(|term| async move { slices.run(&term).await });
        let endpoints = endpoints::Controller::new(clients("endpoint-controller"), shared.clone());
        self.spawn(|term| async move { endpoints.run(&term).await });

        let client = clients("endpointslicemirroring-controller");
        let recorder = self.recorder(&client, "endpoint-slice-mirroring-controller");
        let mirroring = endpointslicemirroring::Controller::new(client, shared.clone(), recorder);
        self.spawn(|term| async move { mirroring.run(&term).await });

        let ranges = servicecidr::Controller::new(clients("service-cidrs-controller"), shared.clone());
        self.spawn(|term| async move { ranges.run(&term).await });

        let client = clients("service-controller");
        let recorder = self.recorder(&client, "service-controller");
        let conditions = programmed::Controller::new(client.clone(), shared.clone());
        self.spawn(|term| async move { conditions.run(&term).await });
        let pools = config.load_balancer_pools.clone();
        let balancers = load_balancer::Controller::new(client, shared.clone(), recorder, pools);
        self.spawn(|term| async move { balancers.run(&term).await });
    }

    fn start_namespaces(&mut self, clients: &impl Fn(&str) -> Client, shared: &Arc<Shared>, config: &Config) {
        let namespaces = namespace::Controller::new(clients("namespace-controller"), shared.clone());
        self.spawn(|term| async move { namespaces.run(&term).await });
        let accounts =
            namespaced::ServiceAccounts::new(clients("service-account-controller"), shared.clone());
        self.spawn(|term| async move { accounts.run(&term).await });
        let pem = config.root_ca_pem.clone();
        let roots = namespaced::RootCas::new(clients("root-ca-cert-publisher"), shared.clone(), pem);
        self.spawn(|term| async move { roots.run(&term).await });
    }

    fn start_nodes(&mut self, clients: &impl Fn(&str) -> Client, shared: &Arc<Shared>, config: &Config) {
        let client = clients("node-ipam-controller");
        let recorder = self.recorder(&client, "node-ipam-controller");
        let ranges = (config.cluster_cidrs.clone(), config.service_cidrs.clone());
        let ipam = node::ipam::Controller::new(client, shared.clone(), recorder, ranges);
        self.spawn(|term| async move { ipam.run(&term).await });

        let client = clients("node-controller");
        let recorder = self.recorder(&client, "node-controller");
        let (to, grace) = (recorder.clone(), config.node_monitor_grace);
        let lifecycle = node::lifecycle::Controller::new(client.clone(), shared.clone(), to, grace);
        self.spawn(|term| async move { lifecycle.run(&term).await });
        let eviction = node::eviction::Controller::new(client.clone(), shared.clone(), recorder);
        self.spawn(|term| async move { eviction.run(&term).await });
        let orphans = node::orphans::Controller::new(client, shared.clone());
        self.spawn(|term| async move { orphans.run(&term).await });
    }

    /// Waits for all tasks. One that ends before the term does has failed: the term ends with it.
    async fn join(mut self) {
        while let Some(ended) = self.set.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a controller panicked; all stop");
                self.term.cancel();
            }
        }
    }
}
