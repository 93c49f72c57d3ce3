//! The running half: watches of pods, namespaces and policies, devices, pods that wait at the gate.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, FuturesUnordered, SelectAll};
use futures::{FutureExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::ListParams;
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt as _};
use tokio::sync::{mpsc, oneshot};
use weft_ebpf_abi::Address;

use super::edges::{Edges, Trials};
use super::gate::{Gate, Request};
use super::maps::PolicyTable;
use super::objects::{self, Name, Policy};
use super::planner::Planner;
use crate::maps::kernel::KernelMaps;
use crate::metrics::Metrics;
use crate::programs::Programs;
use crate::watch::{Relist, source};

/// Events taken in before the maps are brought up to date: bounds the delay under a storm.
const MAX_EVENTS_PER_SYNC: usize = 4_096;
/// First and longest wait before what failed is tried again.
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_LONGEST: Duration = Duration::from_secs(10);

/// How often the counters of policies on trial are read into the metrics.
const TRIALS_EVERY: Duration = Duration::from_secs(5);

/// What policy needs of the loaded programs.
#[derive(Debug)]
pub(crate) struct Parts {
    edges: Edges,
    maps: KernelMaps<PolicyTable>,
    trials: Trials,
}

impl Parts {
    pub(crate) fn new(programs: &Programs) -> Result<Self, crate::Error> {
        Ok(Self {
            edges: Edges::new(programs)?,
            maps: programs.policy_maps()?,
            trials: Trials::new(programs)?,
        })
    }
}

#[expect(
    clippy::large_enum_variant,
    reason = "an event is taken apart as soon as it comes; a box would be one allocation more"
)]
enum Event {
    Pod(watcher::Event<Pod>),
    Namespace(watcher::Event<Namespace>),
    Policy(watcher::Event<NetworkPolicy>),
}

/// Policies of a namespace as they were when a pod asked, with the list's version.
struct Listed {
    request: Request,
    policies: Vec<NetworkPolicy>,
    version: u64,
}

/// A pod that waits for its addresses to have devices and for the maps.
struct Waiting {
    addresses: Vec<Address>,
    done: oneshot::Sender<()>,
}

struct Runner {
    node: String,
    client: Client,
    planner: Planner,
    edges: Edges,
    maps: KernelMaps<PolicyTable>,
    trials: Trials,
    metrics: Metrics,
    pods: Relist<Name>,
    namespaces: Relist<String>,
    policies: Relist<Name>,
    /// Versions of the policies entered: a pod's list may be ahead of the watch.
    versions: HashMap<Name, u64>,
    lists: FuturesUnordered<BoxFuture<'static, Option<Listed>>>,
    waiting: Vec<Waiting>,
    /// Devices came or went.
    devices_changed: bool,
    /// Addresses of this node's pods that no device was found for.
    missing: Vec<Address>,
    retry: Duration,
}

/// Carries NetworkPolicy until it is dropped; without a gate it only waits for that. Programs and maps stay pinned: policies hold on.
///
/// Needs list and watch on pods, namespaces and networkpolicies.networking.k8s.io.
pub(crate) async fn run(
    parts: Parts,
    client: Client,
    node: String,
    gate: Option<Gate>,
    metrics: Metrics,
) -> Result<(), crate::Error> {
    let Some(gate) = gate else { return std::future::pending().await };
    let mut runner = Runner {
        node,
        client,
        planner: Planner::new(),
        edges: parts.edges,
        maps: parts.maps,
        trials: parts.trials,
        metrics,
        pods: Relist::default(),
        namespaces: Relist::default(),
        policies: Relist::default(),
        versions: HashMap::new(),
        lists: FuturesUnordered::new(),
        waiting: Vec::new(),
        devices_changed: true,
        missing: Vec::new(),
        retry: RETRY_FIRST,
    };
    runner.planner.adopt(&mut runner.maps)?;
    runner.run(gate.open()).await
}

impl Runner {
    async fn run(&mut self, mut requests: mpsc::Receiver<Request>) -> Result<(), crate::Error> {
        let mut events = sources(&self.client);
        // Subscribed before the first look: no change falls between the two.
        let mut changes = weft_cni_netlink::Events::subscribe()?;
        let mut trials = tokio::time::interval(TRIALS_EVERY);
        loop {
            let lagging = self.is_lagging();
            tokio::select! {
                _ = trials.tick() => {
                    self.count_trials();
                    continue;
                }
                Some(event) = events.next() => {
                    self.absorb(event);
                    for _ in 0..MAX_EVENTS_PER_SYNC {
                        let Some(Some(event)) = events.next().now_or_never() else { break };
                        self.absorb(event);
                    }
                }
                Some(request) = requests.recv() => {
                    self.lists.push(list(self.client.clone(), request).boxed());
                    continue;
                }
                Some(listed) = self.lists.next() => {
                    let Some(listed) = listed else { continue };
                    self.admit(listed);
                }
                changed = changes.next() => {
                    let mut devices = concerns_devices(&changed?);
                    while let Some(more) = changes.next().now_or_never() {
                        devices |= concerns_devices(&more?);
                    }
                    if !devices {
                        continue;
                    }
                    self.devices_changed = true;
                }
                () = tokio::time::sleep(self.retry), if lagging => {
                    self.devices_changed |= !self.waiting.is_empty();
                }
            }
            self.sync();
        }
    }

    fn count_trials(&mut self) {
        let current = self.planner.trials();
        match self.trials.read(&current) {
            Ok(counts) => self.metrics.would_drop(&current, &counts),
            Err(error) => {
                tracing::warn!(%error, source = ?std::error::Error::source(&error), "cannot count for policies on trial")
            }
        }
    }

    fn all_known(&self) -> bool {
        self.pods.known && self.namespaces.known && self.policies.known
    }

    fn is_lagging(&self) -> bool {
        self.all_known() && (self.planner.is_dirty() || self.devices_changed || !self.waiting.is_empty())
    }

    /// Nothing is written before all sources are known: half of them would open or close what was adopted.
    fn sync(&mut self) {
        self.waiting.retain(|waiting| !waiting.done.is_closed());
        if !self.all_known() {
            return;
        }
        let missing = self.planner.without_device();
        // A pod whose device can't be found is no reason to look again at every event.
        if self.devices_changed || missing != self.missing {
            let found = self.edges.refresh(&missing);
            match found.and_then(|()| self.edges.publish(&self.planner.with_host_ports())) {
                Ok(()) => self.devices_changed = false,
                Err(error) => {
                    tracing::warn!(%error, source = ?std::error::Error::source(&error), "pods' devices are not all known, will be retried");
                }
            }
            self.planner.set_devices(self.edges.attached().clone());
            self.missing = self.planner.without_device();
        }
        let result = self.planner.sync(&mut self.maps);
        if let Err(error) = &result {
            tracing::warn!(%error, source = ?std::error::Error::source(error), "policies are behind, will be retried");
        }
        self.metrics.policies(&self.planner.counts());
        if result.is_ok() {
            self.answer();
        }
        let lagging = self.is_lagging();
        self.retry = if lagging { (self.retry * 2).min(RETRY_LONGEST) } else { RETRY_FIRST };
    }

    /// Lets the pods go whose addresses all have devices.
    fn answer(&mut self) {
        let attached = self.edges.attached();
        let (ready, rest) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiting: &Waiting| waiting.addresses.iter().all(|a| attached.contains_key(a)));
        self.waiting = rest;
        for waiting in ready {
            // Who has given up meanwhile asks again.
            let _ = waiting.done.send(());
        }
    }

    /// Takes in a pod that waits, with the policies of its namespace.
    fn admit(&mut self, listed: Listed) {
        let Listed { request, policies, version } = listed;
        let Some(name) = Name::of(request.pod.as_ref()) else { return };
        let there: HashSet<Name> = policies.iter().filter_map(Name::of).collect();
        let gone = self.planner.policy_names().into_iter().filter(|policy| {
            let known = self.versions.get(policy).copied().unwrap_or(0);
            policy.namespace == name.namespace && !there.contains(policy) && known <= version
        });
        for policy in gone.collect::<Vec<_>>() {
            self.planner.delete_policy(&policy);
            self.versions.remove(&policy);
        }
        for policy in &policies {
            self.apply_policy(policy);
        }
        let addresses: Vec<Address> = request.addresses.iter().copied().map(Address::from).collect();
        let Some(mut pod) = objects::Pod::new(&request.pod, &self.node) else {
            let _ = request.done.send(());
            return;
        };
        pod.local = true;
        self.planner.grant(&name, pod, addresses.clone());
        self.waiting.push(Waiting { addresses, done: request.done });
        // Its device came before it asked.
        self.devices_changed = true;
    }

    fn apply_policy(&mut self, object: &NetworkPolicy) {
        let Some(name) = Name::of(object) else { return };
        let version = version(object);
        if self.versions.get(&name).is_some_and(|known| *known > version) {
            return;
        }
        let Some(policy) = Policy::new(object) else { return };
        self.versions.insert(name.clone(), version);
        self.planner.apply_policy(&name, policy);
    }

    fn absorb(&mut self, event: Event) {
        match event {
            Event::Pod(event) => self.absorb_pod(event),
            Event::Namespace(event) => self.absorb_namespace(event),
            Event::Policy(event) => self.absorb_policy(event),
        }
    }

    fn absorb_pod(&mut self, event: watcher::Event<Pod>) {
        match event {
            watcher::Event::Init => self.pods.begin(true),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                let Some(name) = Name::of(&object) else { return };
                self.planner.apply_pod(&name, objects::Pod::new(&object, &self.node));
                self.pods.name(|| Some(name));
            }
            watcher::Event::Delete(object) => {
                if let Some(name) = Name::of(&object) {
                    self.planner.delete_pod(&name);
                }
            }
            watcher::Event::InitDone => {
                let seen = self.pods.finish();
                for name in self.planner.pod_names().iter().filter(|name| !seen.contains(*name)) {
                    self.planner.delete_pod(name);
                }
            }
        }
    }

    fn absorb_namespace(&mut self, event: watcher::Event<Namespace>) {
        match event {
            watcher::Event::Init => self.namespaces.begin(true),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                let labels = object.metadata.labels.clone().unwrap_or_default();
                self.planner.apply_namespace(&object.name_any(), &labels);
                self.namespaces.name(|| Some(object.name_any()));
            }
            watcher::Event::Delete(object) => self.planner.delete_namespace(&object.name_any()),
            watcher::Event::InitDone => {
                let seen = self.namespaces.finish();
                for name in self.planner.namespace_names().iter().filter(|name| !seen.contains(*name)) {
                    self.planner.delete_namespace(name);
                }
            }
        }
    }

    fn absorb_policy(&mut self, event: watcher::Event<NetworkPolicy>) {
        match event {
            watcher::Event::Init => self.policies.begin(true),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.apply_policy(&object);
                self.policies.name(|| Name::of(&object));
            }
            watcher::Event::Delete(object) => {
                if let Some(name) = Name::of(&object) {
                    self.planner.delete_policy(&name);
                    self.versions.remove(&name);
                }
            }
            watcher::Event::InitDone => {
                let seen = self.policies.finish();
                for name in self.planner.policy_names().iter().filter(|name| !seen.contains(*name)) {
                    self.planner.delete_policy(name);
                    self.versions.remove(name);
                }
            }
        }
    }
}

/// Versions are numbers and grow (KEP-5504).
fn version<K: Resource>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Lists the policies of a waiting pod's namespace: one that was there before the pod must hold for its first packet, and the
/// watch of policies may be behind that of pods. `None` if nobody waits any more.
async fn list(client: Client, mut request: Request) -> Option<Listed> {
    let namespace = request.pod.metadata.namespace.clone()?;
    let api: Api<NetworkPolicy> = Api::namespaced(client, &namespace);
    let mut wait = RETRY_FIRST;
    loop {
        let all = ListParams::default();
        let listed = tokio::select! {
            listed = api.list(&all) => listed,
            () = request.done.closed() => return None,
        };
        match listed {
            Ok(list) => {
                let version = list.metadata.resource_version.and_then(|v| v.parse().ok()).unwrap_or(0);
                return Some(Listed { request, policies: list.items, version });
            }
            Err(error) => tracing::warn!(%error, namespace, "cannot list policies, will be tried again"),
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(RETRY_LONGEST),
            () = request.done.closed() => return None,
        }
    }
}

fn concerns_devices(events: &[weft_cni_netlink::Event]) -> bool {
    use weft_cni_netlink::Event as E;
    events.iter().any(|event| match event {
        E::Link(_) | E::Lost => true,
        E::Address(_) | E::Route { .. } | E::Neighbour(_) => false,
    })
}

/// The three watches as one stream.
fn sources(client: &Client) -> SelectAll<BoxStream<'static, Event>> {
    let mut all = SelectAll::new();
    all.push(source(Api::all(client.clone()), Event::Pod, "pods"));
    all.push(source(Api::all(client.clone()), Event::Namespace, "namespaces"));
    all.push(source(Api::all(client.clone()), Event::Policy, "networkpolicies"));
    all
}
