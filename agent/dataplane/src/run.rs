//! The running dataplane: watches, synchronisation, devices.

mod absorb;
mod eject;
mod findings;
mod peers;
mod say;
mod setup;
mod sync;

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use ipnetwork::IpNetwork;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use weft_ebpf_abi::{Address, NodeConfig, names};

use crate::abandon::{Search, Searches};
use crate::announce;
use crate::counts::{Counted, WhoseLists};
use crate::ejection::EjectionError;
use crate::maps::kernel::KernelMaps;
use crate::maps::{MapError, Table};
use crate::metrics::Metrics;
use crate::node::{self, Devices, NodeError};
use crate::overlay::inquiry::Inquiry;
use crate::overlay::trial::{self, Trials};
use crate::overlay::{self, Overlay, Ranges, Routing, Tunnels};
use crate::policy;
use crate::programs::{self, ProgramError, Programs};
use crate::reconcile::Reconciler;
use crate::report::Report;
use crate::serve::{self, Checks, ProxyConfig, Shared};
use crate::tables::ServiceName;
use crate::trouble::{self, Trouble};
use crate::xdp::Carrier;

use self::absorb::{Relists, network, services, sources};
use self::eject::Ejecting;
use self::findings::Findings;
use self::peers::Peers;
use self::say::Versions;
use self::setup::{families, set_up};

/// Events taken in before the maps are brought up to date: bounds the delay under a storm.
const MAX_EVENTS_PER_SYNC: usize = 4_096;
/// Services to be told of while the API is slow.
const MAX_TROUBLES: usize = 64;
/// Nodes that fall silent or come back, to be told of while the API is slow.
const MAX_TURNS: usize = 64;
/// Backends that are ejected or come back, likewise.
const MAX_EJECTIONS: usize = 256;
/// First and longest wait before failed operations are tried again.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// Changes whose way to the maps is being timed; more wait only behind Services that fail.
const MAX_TRIGGERS: usize = 4_096;

/// What the dataplane of a node is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the Node.
    pub node_name: String,
    /// The node's address on the network that joins the nodes: its end of the tunnels.
    pub node_ip: IpAddr,
    /// Addresses of all pods: a range for each family that the cluster has.
    pub cluster_cidr: Vec<IpNetwork>,
    /// Addresses of all Services, likewise.
    pub service_cidr: Vec<IpNetwork>,
    /// Service addresses that the node answers itself (cluster DNS): neither translated nor refused.
    pub node_local: Vec<IpAddr>,
    /// Where links and maps are pinned: a bpffs, mounted there if it is not. Services live as long as that mount.
    pub pin_dir: PathBuf,
    /// The node's cgroup below cgroup2's root: `weft/<node>`. Processes below it are served, wherever their network namespace is.
    pub node_cgroup: PathBuf,
    /// The programs.
    pub ebpf_object: &'static [u8],
    /// Where pods wait for their policies; `None` leaves NetworkPolicy to somebody else.
    pub gate: Option<policy::Gate>,
    /// Addresses of NodePorts, health and metrics.
    pub proxy: ProxyConfig,
    /// The cluster's pools of load-balancer addresses: the node answers for these on its link, and for no others.
    pub balancer_pools: Vec<IpNetwork>,
    /// Whose pods the node has.
    pub pod_network: PodNetwork,
    /// How packets get to pods of nodes on the same link.
    pub routing: Routing,
    /// Whether clients outside keep their address towards pods of other nodes by the tunnel, which answer them past this node; and this
    /// node answers clients of others. The network must let nodes send from each other's addresses.
    pub direct_return: bool,
    /// Takes what there is to say of the node's Services, for [`report::keep`](crate::report::keep).
    pub reports: Option<watch::Sender<Report>>,
}

/// Who connects the pods to the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// weft: by [`BRIDGE`](crate::BRIDGE), and tunnels to the other nodes.
    Own,
    /// Another CNI plugin. Services only; without a cgroup of the node's own, all processes of the machine are served.
    Others {
        /// The bridge that pods are ports of, if there is one: packets from it are the cluster's own.
        bridge: Option<String>,
    },
}

impl PodNetwork {
    fn bridge(&self) -> Option<&str> {
        match self {
            Self::Own => Some(crate::BRIDGE),
            Self::Others { bridge } => bridge.as_deref(),
        }
    }
}

/// Why the dataplane does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node is not fit.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The programs are not in place.
    #[error(transparent)]
    Programs(#[from] ProgramError),
    /// The pods' edges could not be taken over.
    #[error(transparent)]
    Edges(#[from] policy::edges::EdgeError),
    /// The maps could not be read.
    #[error("cannot adopt the maps")]
    Adopt(#[from] MapError),
    /// A task ended early.
    #[error("a task of the dataplane was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
    /// Devices could not be listed or watched.
    #[error("cannot watch the node's devices")]
    Devices(#[from] weft_cni_netlink::Error),
    /// Failures of connections can't be read.
    #[error(transparent)]
    Ejections(#[from] EjectionError),
    /// Load-balancer addresses could not be taken away.
    #[error(transparent)]
    Announce(#[from] announce::Error),
}

/// Runs the dataplane of a node until `shutdown`. Programs and maps stay pinned afterwards: Services go on.
///
/// `programmed` becomes true once programs are attached and all Services known at the start are in the maps: nothing in a
/// pod may run before. Needs list and watch on services, endpointslices.discovery.k8s.io and nodes, and
/// for policies on pods, namespaces and networkpolicies.networking.k8s.io.
///
/// # Errors
/// If the programs can't be put in place, or the node's devices can't be watched. What the API or single map operations
/// refuse is retried instead.
pub async fn run(
    config: Config,
    client: Client,
    programmed: watch::Sender<bool>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let config = Arc::new(config);
    let setup = Arc::clone(&config);
    let (programs, mut reconciler, identity) = tokio::task::spawn_blocking(move || set_up(&setup)).await??;
    let parts = policy::Parts::new(&programs)?;
    let metrics = Metrics::default();
    let begins_empty = reconciler.entries(Table::Services) == 0;
    let policies =
        policy::run(parts, client.clone(), config.node_name.clone(), config.gate.clone(), metrics.clone());
    metrics.count_drops(programs.drop_counters()?);
    let (counted, whose_lists) = Counted::of(&programs)?;
    let proxy = Arc::new(config.proxy.clone());
    let shared = Arc::new(Shared { metrics, ..Shared::default() });
    let cgroup2 = node::cgroup2_mount()?;
    let node_cgroup = cgroup2.join(&config.node_cgroup);
    let (troubles, troubled) = mpsc::channel(MAX_TROUBLES);
    let (answers, wanted) = watch::channel(BTreeSet::new());
    let announce = announce::keep_running(config.node_ip, wanted, shutdown.clone());
    let (turns, turned) = mpsc::channel(MAX_TURNS);
    let (peers, watching) = peers::begin(&config, shared.metrics.clone(), turns, shutdown.clone());
    let (tell, ejected) = mpsc::channel(MAX_EJECTIONS);
    let ejecting = Ejecting::adopt(&programs, &mut reconciler, cgroup2, tell)?;
    let (links, trying) = trial::begin(shutdown.clone());
    let (findings, found, finding) = findings::begin(&shutdown);
    let mut dataplane = Dataplane {
        ejecting,
        troubles,
        searches: Searches::new(Search { node_cgroup, pin_dir: config.pin_dir.clone() }),
        overlay: Overlay::new(config.node_name.clone(), config.node_ip, config.routing),
        near: Ranges::adopt(&programs, names::NEAR)?,
        direct: Ranges::adopt(&programs, names::DIRECT)?,
        tunnels: Tunnels::adopt(&programs)?,
        links,
        findings,
        carrier: Carrier::adopt(&programs, config.proxy.xdp)?,
        programs,
        reconciler,
        identity,
        devices: Devices::default(),
        checks: Checks::new(Arc::clone(&proxy), Arc::clone(&shared)),
        shared: Arc::clone(&shared),
        proxy: Arc::clone(&proxy),
        families: families(&config),
        pod_network: config.pod_network.clone(),
        programmed,
        balancer_pools: config.balancer_pools.clone(),
        answers,
        peers,
        reports: config.reports.clone(),
        whose_lists,
        seen: Versions::default(),
        relists: Relists::default(),
        begins_empty,
        ways_untold: true,
        devices_changed: false,
        triggers: VecDeque::new(),
        retry: RETRY_FIRST,
    };
    let telling = trouble::tell(client.clone(), &config.node_name, troubled, turned, ejected, found);
    let beside = [
        telling.boxed(),
        serve::serve(&proxy, shared, Some(counted)).boxed(),
        announce.boxed(),
        watching.boxed(),
        trying.boxed(),
        finding.boxed(),
    ];
    let services = as_task(async move { dataplane.run(client, shutdown).await });
    first_to_end([services, policies.boxed()], beside).await
}

/// The outcome of the first that ends; what runs beside never does.
async fn first_to_end<'f>(
    parts: [BoxFuture<'f, Result<(), Error>>; 2],
    beside: [BoxFuture<'f, ()>; 6],
) -> Result<(), Error> {
    let mut all: FuturesUnordered<_> = parts.into_iter().collect();
    all.extend(beside.map(|part| part.map(Ok).boxed()));
    // There is one, so there is an outcome.
    all.next().await.unwrap_or(Ok(()))
}

/// Runs it as a task of its own for as long as the future is there. What wakes it, the connection of a watch, is another task: so nothing
/// else is looked at on the way of a change to the maps.
fn as_task(
    work: impl Future<Output = Result<(), Error>> + Send + 'static,
) -> BoxFuture<'static, Result<(), Error>> {
    let task = AbortOnDropHandle::new(tokio::spawn(work));
    task.map(|ended| ended.unwrap_or_else(|error| Err(error.into()))).boxed()
}

/// Removes all that a dataplane left on its node: links, maps, the overlay, the cgroup. What is gone already is no error.
/// The pods must be gone first.
///
/// # Errors
/// If the kernel refuses to remove something.
pub async fn cleanup(config: &Config) -> Result<(), Error> {
    let (pins, cgroup) = (config.pin_dir.clone(), config.node_cgroup.clone());
    let own = config.pod_network == PodNetwork::Own;
    tokio::task::spawn_blocking(move || {
        programs::remove(&pins)?;
        if own {
            overlay::cleanup()?;
            announce::cleanup()?;
        }
        node::remove_cgroup(&node::cgroup2_mount()?, &cgroup)?;
        Ok(())
    })
    .await?
}

struct Dataplane {
    programs: Programs,
    reconciler: Reconciler<KernelMaps>,
    ejecting: Ejecting,
    overlay: Overlay,
    near: Ranges,
    direct: Ranges,
    tunnels: Tunnels,
    links: Inquiry<Trials, BTreeSet<IpNetwork>>,
    findings: Findings,
    carrier: Carrier,
    identity: NodeConfig,
    devices: Devices,
    shared: Arc<Shared>,
    checks: Checks,
    troubles: mpsc::Sender<Trouble>,
    searches: Searches,
    proxy: Arc<ProxyConfig>,
    /// Whether a family is IPv6, for each that pods have.
    families: Vec<bool>,
    pod_network: PodNetwork,
    programmed: watch::Sender<bool>,
    balancer_pools: Vec<IpNetwork>,
    /// Load-balancer addresses that this node is fit to answer for.
    answers: watch::Sender<BTreeSet<IpAddr>>,
    peers: Peers,
    reports: Option<watch::Sender<Report>>,
    whose_lists: mpsc::Receiver<WhoseLists>,
    seen: Versions,
    relists: Relists,
    /// No Service was in the maps when they were adopted.
    begins_empty: bool,
    /// The programs, and who looks into the network, may not know the overlay as it is.
    ways_untold: bool,
    /// Devices or addresses are not as they were looked at.
    devices_changed: bool,
    /// Times of the changes that wait to reach the maps, and whose they are.
    triggers: VecDeque<(ServiceName, Timestamp)>,
    retry: Duration,
}

impl Dataplane {
    async fn run(&mut self, client: Client, shutdown: CancellationToken) -> Result<(), Error> {
        let mut events = sources(&client);
        let mut services = Some(|| services(&client));
        // Subscribed before the first look: no change falls between the two.
        events.push(network(weft_cni_netlink::Events::subscribe()?));
        events.extend(self.inquiries());
        self.refresh_devices()?;
        let stopped = shutdown.cancelled_owned();
        tokio::pin!(stopped);
        let mut due = None;
        loop {
            let lagging = self.relists.all_known() && self.is_behind();
            // Fixed when it begins: events must not put it off.
            due = lagging.then(|| due.unwrap_or_else(|| tokio::time::Instant::now() + self.retry));
            // What comes often is asked before the rest, and looks at no other source than the one that has something.
            tokio::select! {
                biased;
                () = &mut stopped => return Ok(()),
                () = tokio::time::sleep_until(due.unwrap_or_else(tokio::time::Instant::now)), if lagging => {
                    due = None;
                    self.retry = (self.retry * 2).min(RETRY_LONGEST);
                }
                Some(event) = events.next() => {
                    let mut changed = self.absorb(event)?;
                    for _ in 0..MAX_EVENTS_PER_SYNC {
                        let Some(Some(event)) = events.next().now_or_never() else { break };
                        changed |= self.absorb(event)?;
                    }
                    if std::mem::take(&mut self.devices_changed) {
                        self.refresh_devices()?;
                    }
                    if let Some(services) = services.take_if(|_| self.relists.all_but_services_known()) {
                        events.push(services());
                    }
                    if !changed {
                        // A repair of the overlay waits for the retry: somebody may go on taking entries away.
                        continue;
                    }
                }
                () = self.ejecting.ready() => self.take_ejections(),
                () = self.searches.progress() => continue,
                Some(question) = self.whose_lists.recv() => {
                    question.answer(|list| self.reconciler.owner_of_list(list));
                    continue;
                }
            }
            self.sync();
        }
    }

    /// Tells the overlay of the kernel's changes; answers whether devices or addresses are among them.
    fn take_in(&mut self, events: &[weft_cni_netlink::Event]) -> bool {
        events.iter().for_each(|event| self.overlay.observe(event));
        concerns_devices(events)
    }

    /// Takes in devices and addresses: edges to attach to, addresses for NodePorts, the overlay's source.
    fn refresh_devices(&mut self) -> Result<(), Error> {
        let mut devices = node::devices(self.pod_network.bridge())?;
        // An address of a family that pods lack answers no NodePort.
        devices.addresses.retain(|ip| self.families.contains(&ip.is_ipv6()));
        // Pods' devices come and go without a change of the node's own.
        if let Err(error) = self.carrier.refresh(&self.programs, &devices) {
            tracing::warn!(%error, source = ?std::error::Error::source(&error), "XDP is behind, the tc program carries");
        }
        if devices == self.devices {
            return Ok(());
        }
        if devices.bridge != self.identity.bridge_ifindex || devices.overlay != self.identity.overlay_ifindex
        {
            self.identity.bridge_ifindex = devices.bridge;
            self.identity.overlay_ifindex = devices.overlay;
            self.programs.configure(self.identity)?;
        }
        if devices.edge != self.devices.edge {
            self.programs.attach_edges(&devices.edge)?;
        }
        let addresses = devices.addresses.iter().copied();
        let answering = addresses.filter(|ip| self.proxy.answers(*ip)).map(Address::from);
        self.reconciler.set_node_addresses(answering.collect());
        self.overlay.set_devices(&devices);
        self.devices = devices;
        Ok(())
    }
}

/// Routes and neighbours come and go without a change of devices.
fn concerns_devices(events: &[weft_cni_netlink::Event]) -> bool {
    use weft_cni_netlink::Event as E;
    events.iter().any(|event| match event {
        E::Link(_) | E::Address(_) | E::Lost => true,
        E::Route { .. } | E::Neighbour(_) => false,
    })
}
