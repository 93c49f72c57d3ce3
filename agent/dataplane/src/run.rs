//! The running dataplane: watches, synchronisation, devices.

use std::collections::HashSet;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{BoxStream, SelectAll};
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher::{self, watcher};
use kube::runtime::WatchStreamExt;
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;
use weft_ebpf_abi::NodeConfig;

use crate::maps::MapError;
use crate::maps::kernel::KernelMaps;
use crate::metrics::Handle;
use crate::node::{self, NodeError};
use crate::programs::{self, ProgramError, Programs};
use crate::reconcile::Reconciler;
use crate::tables::{service_name, slice_name};

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
    /// Where cgroup2 is mounted; `None` looks for it.
    pub cgroup2: Option<PathBuf>,
    /// The node's cgroup below it: `weft/<node>`. Processes below it are served, wherever their network namespace is.
    pub node_cgroup: String,
    /// A bpffs, mounted there if it is not. Pins are at `<bpffs>/weft/<node>`, and live as long as that mount.
    pub bpffs: PathBuf,
    /// The programs.
    pub object: Arc<[u8]>,
    /// Bridge of the pods.
    pub bridge: String,
    /// The overlay's device.
    pub overlay: String,
}

impl Config {
    /// Where this node's pins are.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        self.bpffs.join("weft").join(&self.node_name)
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
    /// The maps could not be read.
    #[error("cannot adopt the maps")]
    Adopt(#[from] MapError),
    /// A blocking task ended early.
    #[error("setting up the dataplane was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
    /// Devices could not be listed.
    #[error("cannot list the node's devices")]
    Devices(#[source] std::io::Error),
}

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
/// Needs list and watch on services, endpointslices.discovery.k8s.io and nodes.
pub async fn run(
    config: Config,
    client: Client,
    shutdown: CancellationToken,
    handle: Handle,
) -> Result<(), Error> {
    let config = Arc::new(config);
    let setup = Arc::clone(&config);
    let (programs, reconciler) = tokio::task::spawn_blocking(move || set_up(&setup)).await??;
    let mut dataplane = Dataplane {
        config,
        programs,
        reconciler,
        handle,
        services: Relist::new(),
        slices: Relist::new(),
        nodes: Relist::new(),
        triggers: Vec::new(),
        retry: RETRY_FIRST,
    };
    dataplane.refresh_devices()?;
    dataplane.run(client, shutdown).await
}

/// Removes all that a dataplane left on its node: links, then maps.
pub fn cleanup(config: &Config) -> Result<(), Error> {
    programs::remove(&config.pins())?;
    // Another node of the machine may still have its pins in the folder above: then it stays.
    let _ = std::fs::remove_dir(config.bpffs.join("weft"));
    Ok(())
}

/// Loads and attaches. Programs see a node's Services as soon as they are in the maps, so attaching comes first.
fn set_up(config: &Config) -> Result<(Programs, Reconciler<KernelMaps>), Error> {
    node::ensure_bpffs(&config.bpffs)?;
    let cgroup2 = match &config.cgroup2 {
        Some(path) => path.clone(),
        None => node::cgroup2_mount()?,
    };
    let cgroup_id = node::cgroup_id(&cgroup2.join(&config.node_cgroup))?;
    let netns = std::path::Path::new("/proc/self/ns/net");
    let netns_cookie = crate::sys::netns_cookie().map_err(node::failed("get the cookie of", netns))?;
    let mut programs = Programs::load(&config.object, &config.pins())?;
    programs.configure(NodeConfig {
        netns_cookie,
        cgroup_id,
        bridge_ifindex: node::ifindex(&config.bridge),
        overlay_ifindex: node::ifindex(&config.overlay),
        ..NodeConfig::default()
    })?;
    programs.attach_sockets(&cgroup2)?;
    let reconciler = Reconciler::adopt(&config.node_name, programs.maps()?)?;
    tracing::info!(node = %config.node_name, services = reconciler.ledger().services.len(), "dataplane attached");
    Ok((programs, reconciler))
}

struct Dataplane {
    config: Arc<Config>,
    programs: Programs,
    reconciler: Reconciler<KernelMaps>,
    handle: Handle,
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
        let mut links = crate::links::LinkChanges::open().map_err(Error::Devices)?;
        let mut drops = tokio::time::interval(DROPS_EVERY);
        loop {
            let lagging = self.all_known() && self.reconciler.is_dirty();
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(event) = events.next() => {
                    self.absorb(event);
                    for _ in 0..MAX_EVENTS_PER_SYNC {
                        let Some(Some(event)) = events.next().now_or_never() else { break };
                        self.absorb(event);
                    }
                }
                changed = links.changed() => {
                    changed.map_err(Error::Devices)?;
                    self.refresh_devices()?;
                }
                () = tokio::time::sleep(self.retry), if lagging => {}
                _ = drops.tick() => {
                    for (reason, count) in self.programs.drops()? {
                        self.handle.metrics.dropped(reason, count);
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
        if !self.all_known() || !self.reconciler.is_dirty() {
            if self.all_known() {
                self.handle.set_synced();
            }
            return;
        }
        let started = Instant::now();
        let report = self.reconciler.sync();
        let now = Timestamp::now();
        let (took, services) = (started.elapsed(), self.reconciler.services());
        self.handle.metrics.synced(took, now.as_duration().as_secs_f64(), report.failed, services);
        tracing::debug!(applied = report.applied, failed = report.failed, took = ?took, "maps synchronised");
        if self.reconciler.is_dirty() {
            self.retry = (self.retry * 2).min(RETRY_LONGEST);
            return;
        }
        self.retry = RETRY_FIRST;
        for trigger in self.triggers.drain(..) {
            self.handle.metrics.programmed(now.duration_since(trigger).as_secs_f64());
        }
        self.handle.set_synced();
    }

    fn refresh_devices(&mut self) -> Result<(), Error> {
        let devices = node::devices(&self.config.bridge, &self.config.overlay).map_err(Error::Devices)?;
        self.programs.attach_edges(&devices.edge)?;
        self.reconciler.set_node_addresses(devices.addresses);
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
                self.nodes.seen.extend(object.metadata.name);
            }
            watcher::Event::Delete(_) => {}
            watcher::Event::InitDone => {
                self.nodes.finish(Vec::new());
            }
        }
    }
}

fn trigger_time(slice: &EndpointSlice) -> Option<Timestamp> {
    slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()
}

/// The three watches as one stream. A watch that fails is tried again with a growing wait, and lists anew if it must.
fn sources(client: &Client) -> SelectAll<BoxStream<'static, Event>> {
    fn source<K>(api: Api<K>, wrap: fn(watcher::Event<K>) -> Event, what: &'static str) -> BoxStream<'static, Event>
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
