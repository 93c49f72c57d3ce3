//! The running dataplane: watches, synchronisation, devices.

use std::collections::HashSet;
use std::hash::Hash;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{BoxStream, SelectAll};
use futures::{FutureExt, StreamExt};
use ipnetwork::Ipv4Network;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_cni_netlink::Netlink;
use weft_ebpf_abi::{Address, NodeConfig};

use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;
use crate::metrics::Metrics;
use crate::node::{self, Devices, NodeError};
use crate::overlay::Overlay;
use crate::policy;
use crate::programs::{self, ProgramError, Programs};
use crate::reconcile::Reconciler;
use crate::tables::{Tables, service_name, slice_name};

/// Annotation with the time of the change that a slice carries on.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Events taken in before the maps are brought up to date: bounds the delay under a storm.
const MAX_EVENTS_PER_SYNC: usize = 4_096;
/// First and longest wait before failed operations are tried again.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// How often drop counters are read into the metrics.
const DROPS_EVERY: Duration = Duration::from_secs(10);

/// What the dataplane of a node is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the Node.
    pub node_name: String,
    /// The node's address on the network that joins the nodes.
    pub node_ip: Ipv4Addr,
    /// Addresses of all pods.
    pub cluster_cidr: Ipv4Network,
    /// Addresses of all Services.
    pub service_cidr: Ipv4Network,
    /// Service addresses that the node answers itself (cluster DNS): neither translated nor refused.
    pub node_local: Vec<Ipv4Addr>,
    /// Where links and maps are pinned: a bpffs, mounted there if it is not. Services live as long as that mount.
    pub pin_dir: PathBuf,
    /// The node's cgroup below cgroup2's root: `weft/<node>`. Processes below it are served, wherever their network namespace is.
    pub node_cgroup: PathBuf,
    /// The programs.
    pub ebpf_object: &'static [u8],
    /// Where pods wait for their policies.
    pub gate: policy::Gate,
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
    /// The maps could not be read.
    #[error("cannot adopt the maps")]
    Adopt(#[from] MapError),
    /// A blocking task ended early.
    #[error("setting up the dataplane was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
    /// Devices could not be listed or watched.
    #[error("cannot watch the node's devices")]
    Devices(#[from] weft_cni_netlink::Error),
}

#[expect(
    clippy::large_enum_variant,
    reason = "an event is taken apart as soon as it comes; a box would be one allocation more"
)]
enum Event {
    Service(watcher::Event<Service>),
    Slice(watcher::Event<EndpointSlice>),
    Node(watcher::Event<Node>),
}

/// A source's list in progress: what was there before and has not been named again is gone.
#[derive(Debug)]
struct Relist<K> {
    known: bool,
    seen: HashSet<K>,
}

impl<K: Eq + Hash> Relist<K> {
    fn new() -> Self {
        Self { known: false, seen: HashSet::new() }
    }

    /// Ends the list; returns those of `before` that it did not name.
    fn finish(&mut self, before: Vec<K>) -> Vec<K> {
        self.known = true;
        let seen = std::mem::take(&mut self.seen);
        before.into_iter().filter(|k| !seen.contains(k)).collect()
    }
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
    run_with_metrics(config, client, programmed, Metrics::default(), shutdown).await
}

/// As [`run`], with metrics that the caller has registered.
///
/// # Errors
/// As [`run`].
pub async fn run_with_metrics(
    config: Config,
    client: Client,
    programmed: watch::Sender<bool>,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let config = Arc::new(config);
    let setup = Arc::clone(&config);
    let (programs, reconciler, identity) = tokio::task::spawn_blocking(move || set_up(&setup)).await??;
    let parts = policy::Parts::new(&programs)?;
    let policies =
        policy::run(parts, client.clone(), config.node_name.clone(), config.gate.clone(), metrics.clone());
    let mut dataplane = Dataplane {
        overlay: Overlay::new(config.node_name.clone(), config.node_ip),
        programs,
        reconciler,
        identity,
        devices: Devices::default(),
        metrics,
        programmed,
        services: Relist::new(),
        slices: Relist::new(),
        nodes: Relist::new(),
        triggers: Vec::new(),
        retry: RETRY_FIRST,
    };
    tokio::select! {
        ended = dataplane.run(client, shutdown) => ended,
        ended = policies => ended,
    }
}

/// Removes all that a dataplane left on its node: links, maps, the overlay, the cgroup. What is gone already is no error.
/// The pods must be gone first.
///
/// # Errors
/// If the kernel refuses to remove something.
pub async fn cleanup(config: &Config) -> Result<(), Error> {
    let (pins, cgroup) = (config.pin_dir.clone(), config.node_cgroup.clone());
    tokio::task::spawn_blocking(move || {
        programs::remove(&pins)?;
        Netlink::open()?.delete_link_named(crate::OVERLAY)?;
        node::remove_cgroup(&node::cgroup2_mount()?, &cgroup)?;
        Ok(())
    })
    .await?
}

/// Loads and attaches. Programs see a node's Services as soon as they are in the maps, so attaching comes first.
fn set_up(config: &Config) -> Result<(Programs, Reconciler<KernelMaps>, NodeConfig), Error> {
    node::ensure_bpffs(&config.pin_dir)?;
    let cgroup2 = node::cgroup2_mount()?;
    let cgroup_id = node::cgroup_id(&cgroup2.join(&config.node_cgroup))?;
    let netns = std::path::Path::new("/proc/self/ns/net");
    let netns_cookie = node::netns_cookie().map_err(node::failed("get the cookie of", netns))?;
    let mut programs = Programs::load(config.ebpf_object, &config.pin_dir)?;
    let devices = node::devices()?;
    let identity = NodeConfig {
        netns_cookie,
        cgroup_id,
        bridge_ifindex: devices.bridge,
        overlay_ifindex: devices.overlay,
        ..NodeConfig::default()
    };
    programs.configure(identity)?;
    programs.attach_sockets(&cgroup2)?;
    let node_local = config.node_local.iter().map(|ip| Address::from(*ip)).collect();
    let reconciler = Reconciler::adopt(Tables::new(&config.node_name, node_local), programs.maps()?)?;
    tracing::info!(node = %config.node_name, services = reconciler.ledger().services.len(), "dataplane attached");
    Ok((programs, reconciler, identity))
}

struct Dataplane {
    programs: Programs,
    reconciler: Reconciler<KernelMaps>,
    overlay: Overlay,
    identity: NodeConfig,
    devices: Devices,
    metrics: Metrics,
    programmed: watch::Sender<bool>,
    services: Relist<crate::tables::ServiceName>,
    slices: Relist<(String, String)>,
    nodes: Relist<String>,
    /// Times of the changes that wait to reach the maps.
    triggers: Vec<Timestamp>,
    retry: Duration,
}

impl Dataplane {
    async fn run(&mut self, client: Client, shutdown: CancellationToken) -> Result<(), Error> {
        let mut events = sources(&client);
        // Subscribed before the first look: no change falls between the two.
        let mut changes = weft_cni_netlink::Events::subscribe()?;
        self.refresh_devices()?;
        let mut drops = tokio::time::interval(DROPS_EVERY);
        loop {
            let lagging = self.all_known() && (self.reconciler.is_dirty() || self.overlay.is_dirty());
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(event) = events.next() => {
                    self.absorb(event);
                    for _ in 0..MAX_EVENTS_PER_SYNC {
                        let Some(Some(event)) = events.next().now_or_never() else { break };
                        self.absorb(event);
                    }
                }
                changed = changes.next() => {
                    let mut relevant = concerns_devices(&changed?);
                    while let Some(more) = changes.next().now_or_never() {
                        relevant |= concerns_devices(&more?);
                    }
                    if !relevant {
                        continue;
                    }
                    self.refresh_devices()?;
                }
                () = tokio::time::sleep(self.retry), if lagging => {}
                _ = drops.tick() => {
                    for (reason, count) in self.programs.drops()? {
                        self.metrics.dropped(reason, count);
                    }
                    continue;
                }
            }
            self.sync();
        }
    }

    fn all_known(&self) -> bool {
        self.services.known && self.slices.known && self.nodes.known
    }

    /// Nothing is written before all sources are known: half of them would empty the lists of maps that were adopted.
    fn sync(&mut self) {
        if !self.all_known() {
            return;
        }
        if self.overlay.is_dirty()
            && let Err(error) = self.overlay.sync()
        {
            tracing::warn!(%error, source = ?std::error::Error::source(&error), "overlay is behind, will be retried");
        }
        if self.reconciler.is_dirty() {
            self.sync_maps();
        }
        if self.reconciler.is_dirty() || self.overlay.is_dirty() {
            self.retry = (self.retry * 2).min(RETRY_LONGEST);
        } else {
            self.retry = RETRY_FIRST;
        }
        if !self.reconciler.is_dirty() {
            self.programmed.send_if_modified(|is| !std::mem::replace(is, true));
        }
    }

    fn sync_maps(&mut self) {
        let started = Instant::now();
        let report = self.reconciler.sync();
        let now = Timestamp::now();
        let (took, services) = (started.elapsed(), self.reconciler.services());
        self.metrics.synced(took, now.as_duration().as_secs_f64(), report.failed, services);
        tracing::debug!(applied = report.applied, failed = report.failed, ?took, "maps synchronised");
        if !self.reconciler.is_dirty() {
            for trigger in self.triggers.drain(..) {
                self.metrics.programmed(now.duration_since(trigger).as_secs_f64());
            }
        }
    }

    /// Takes in devices and addresses: edges to attach to, addresses for NodePorts, the overlay's source.
    fn refresh_devices(&mut self) -> Result<(), Error> {
        let devices = node::devices()?;
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
        self.reconciler.set_node_addresses(devices.addresses.iter().map(|ip| Address::from(*ip)).collect());
        self.overlay.set_devices(&devices);
        self.devices = devices;
        Ok(())
    }

    fn absorb(&mut self, event: Event) {
        let before = self.all_known();
        match event {
            Event::Service(event) => self.absorb_service(event),
            Event::Slice(event) => self.absorb_slice(event),
            Event::Node(event) => self.absorb_node(event),
        }
        if !before && self.all_known() {
            self.reconciler.sources_are_known();
        }
    }

    fn absorb_service(&mut self, event: watcher::Event<Service>) {
        let tables = &mut self.reconciler.tables;
        let changed: Vec<_> = match event {
            watcher::Event::Init => {
                self.services.seen.clear();
                return;
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.services.seen.extend(service_name(&object));
                tables.apply_service(&object).into_iter().collect()
            }
            watcher::Event::Delete(object) => {
                service_name(&object).and_then(|name| tables.delete_service(&name)).into_iter().collect()
            }
            watcher::Event::InitDone => {
                let gone = self.services.finish(tables.service_names());
                gone.iter().filter_map(|name| tables.delete_service(name)).collect()
            }
        };
        self.reconciler.mark(changed);
    }

    fn absorb_slice(&mut self, event: watcher::Event<EndpointSlice>) {
        let tables = &mut self.reconciler.tables;
        let changed: Vec<_> = match event {
            watcher::Event::Init => {
                self.slices.seen.clear();
                return;
            }
            watcher::Event::InitApply(object) => {
                self.slices.seen.extend(slice_name(&object));
                tables.apply_slice(&object)
            }
            watcher::Event::Apply(object) => {
                let changed = tables.apply_slice(&object);
                if !changed.is_empty() {
                    self.triggers.extend(trigger_time(&object));
                }
                changed
            }
            watcher::Event::Delete(object) => slice_name(&object)
                .and_then(|(namespace, name)| tables.delete_slice(&namespace, &name))
                .into_iter()
                .collect(),
            watcher::Event::InitDone => {
                let gone = self.slices.finish(tables.slice_names());
                gone.iter().filter_map(|(namespace, name)| tables.delete_slice(namespace, name)).collect()
            }
        };
        self.reconciler.mark(changed);
    }

    fn absorb_node(&mut self, event: watcher::Event<Node>) {
        match event {
            watcher::Event::Init => self.nodes.seen.clear(),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.nodes.seen.extend(object.metadata.name.clone());
                self.overlay.apply_node(&object);
            }
            watcher::Event::Delete(object) => {
                if let Some(name) = &object.metadata.name {
                    self.overlay.delete_node(name);
                }
            }
            watcher::Event::InitDone => {
                for name in self.nodes.finish(self.overlay.node_names()) {
                    self.overlay.delete_node(&name);
                }
            }
        }
    }
}

/// Routes and neighbours come and go without a change of devices.
fn concerns_devices(events: &[weft_cni_netlink::Event]) -> bool {
    use weft_cni_netlink::Event as E;
    events.iter().any(|event| match event {
        E::Link(_) | E::Address(_) | E::Lost => true,
        E::Route | E::Neighbour(_) => false,
    })
}

fn trigger_time(slice: &EndpointSlice) -> Option<Timestamp> {
    slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()
}

/// The three watches as one stream. A watch that fails is tried again with a growing wait, and lists anew if it must.
fn sources(client: &Client) -> SelectAll<BoxStream<'static, Event>> {
    fn source<K>(
        api: Api<K>,
        wrap: fn(watcher::Event<K>) -> Event,
        what: &'static str,
    ) -> BoxStream<'static, Event>
    where
        K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
    {
        let events = watcher(api, watcher::Config::default()).default_backoff();
        let good = events.filter_map(move |event| async move {
            event.inspect_err(|error| tracing::warn!(%error, what, "watch failed, will be tried again")).ok()
        });
        good.map(wrap).boxed()
    }
    let mut all = SelectAll::new();
    all.push(source(Api::all(client.clone()), Event::Service, "services"));
    all.push(source(Api::all(client.clone()), Event::Slice, "endpointslices"));
    all.push(source(Api::all(client.clone()), Event::Node, "nodes"));
    all
}
