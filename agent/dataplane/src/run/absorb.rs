//! What the watches say, taken into the tables: a watch's list names what exists, its events what changed.

use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream, SelectAll};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher;
use kube::{Api, Client};
use serde::Deserialize;
use tokio::sync::watch;

use super::{Dataplane, Error, PodNetwork};
use crate::feed::feed;
use crate::peers;
use crate::tables::{ServiceName, service_name, slice_name, wire};
use crate::watch::{Relist, source};

#[expect(
    clippy::large_enum_variant,
    reason = "an event is taken apart as soon as it comes; a box would be one allocation more"
)]
pub(super) enum Event {
    Service(watcher::Event<Bytes>),
    Slice(watcher::Event<Bytes>),
    Node(watcher::Event<Node>),
    /// The kernel's devices, addresses, routes and neighbours.
    Network(Result<Vec<weft_cni_netlink::Event>, weft_cni_netlink::Error>),
    /// Other nodes fell silent, or answer again.
    Silent,
    /// Trial packets came through, or no longer do.
    Proven,
    /// Ways were measured.
    Widths,
    /// A card's checksums were examined.
    Checksums,
}

/// The lists in progress, one for each watch.
#[derive(Debug, Default)]
pub(super) struct Relists {
    services: Relist<ServiceName>,
    slices: Relist<(String, String)>,
    nodes: Relist<String>,
}

impl Relists {
    /// Whether a list of Services is in progress.
    pub(super) fn lists_services(&self) -> bool {
        self.services.listing
    }

    /// Whether every watch has listed once.
    pub(super) fn all_known(&self) -> bool {
        self.services.known && self.all_but_services_known()
    }

    /// Whether every watch but that of Services has.
    pub(super) fn all_but_services_known(&self) -> bool {
        self.slices.known && self.nodes.known
    }
}

impl Dataplane {
    /// Takes in one event; the maps follow at the next synchronisation. Answers whether there is reason for one.
    pub(super) fn absorb(&mut self, event: Event) -> Result<bool, Error> {
        let before = self.relists.all_known();
        match event {
            Event::Service(event) => self.absorb_service(event),
            Event::Slice(event) => self.absorb_slice(event),
            Event::Node(event) => self.absorb_node(event),
            Event::Network(changes) => {
                let concerns = self.take_in(&changes?);
                self.devices_changed |= concerns;
                return Ok(concerns);
            }
            Event::Silent => self.take_silent(),
            Event::Proven => {
                let proven = self.links.found.borrow_and_update().clone();
                self.overlay.set_proven(proven);
            }
            Event::Widths => self.take_widths(),
            Event::Checksums => self.take_broken(),
        }
        if !before && self.relists.all_known() {
            self.reconciler.sources_are_known();
        }
        Ok(true)
    }

    /// What those say who look into the network.
    pub(super) fn inquiries(&self) -> [BoxStream<'static, Event>; 4] {
        [
            turns(&self.peers.silent, || Event::Silent),
            turns(&self.links.found, || Event::Proven),
            turns(&self.findings.widths.found, || Event::Widths),
            turns(&self.findings.checksums.found, || Event::Checksums),
        ]
    }

    pub(super) fn mark(&mut self, changed: Vec<ServiceName>) {
        if !changed.is_empty() {
            self.shared.health.lock().queued(Instant::now());
            self.reconciler.mark(changed);
        }
    }

    fn absorb_service(&mut self, event: watcher::Event<Bytes>) {
        let tables = &mut self.reconciler.tables;
        let mut version = 0;
        let changed: Vec<_> = match event {
            watcher::Event::Init => {
                self.relists.services.begin(!tables.is_empty());
                return;
            }
            watcher::Event::InitApply(json) | watcher::Event::Apply(json) => {
                let Some(object) = decode::<wire::Service<'_>>(&json, |namespace, name| {
                    self.relists.services.name(|| Some(ServiceName::new(namespace, name)));
                }) else {
                    return;
                };
                self.relists.services.name(|| service_name(&object));
                version = object.version();
                tables.apply_service(&object).into_iter().collect()
            }
            watcher::Event::Delete(json) => {
                let name = decode::<wire::Anything<'_>>(&json, |_, _| ()).and_then(|object| {
                    object.names().map(|(namespace, name)| ServiceName::new(namespace, name))
                });
                name.and_then(|name| tables.delete_service(&name)).into_iter().collect()
            }
            watcher::Event::InitDone => {
                let gone = self.relists.services.finish_from(|| tables.service_names());
                gone.iter().filter_map(|name| tables.delete_service(name)).collect()
            }
        };
        self.seen.newest = self.seen.newest.max(version);
        if !changed.is_empty() {
            self.seen.changed = self.seen.changed.max(version);
        }
        self.shared.metrics.services_changed(changed.len());
        self.mark(changed);
    }

    fn absorb_slice(&mut self, event: watcher::Event<Bytes>) {
        let tables = &mut self.reconciler.tables;
        let mut changed: Vec<_> = match event {
            watcher::Event::Init => {
                self.relists.slices.begin(!tables.is_empty());
                return;
            }
            watcher::Event::InitApply(json) => {
                let Some(object) = decode::<wire::Slice<'_>>(&json, |namespace, name| {
                    self.relists.slices.name(|| Some((namespace.to_owned(), name.to_owned())));
                }) else {
                    return;
                };
                self.relists.slices.name(|| slice_name(&object));
                tables.apply_slice(&object)
            }
            watcher::Event::Apply(json) => {
                let Some(object) = decode::<wire::Slice<'_>>(&json, |_, _| ()) else { return };
                let changed = tables.apply_slice(&object);
                if let Some(at) = object.trigger_time().and_then(|at| at.parse::<Timestamp>().ok()) {
                    self.triggers.extend(changed.iter().map(|service| (service.clone(), at)));
                }
                changed
            }
            watcher::Event::Delete(json) => decode::<wire::Anything<'_>>(&json, |_, _| ())
                .and_then(|object| {
                    object.names().and_then(|(namespace, name)| tables.delete_slice(namespace, name))
                })
                .into_iter()
                .collect(),
            watcher::Event::InitDone => {
                let gone = self.relists.slices.finish_from(|| tables.slice_names());
                gone.iter().filter_map(|(namespace, name)| tables.delete_slice(namespace, name)).collect()
            }
        };
        self.shared.metrics.endpoints_changed(changed.len());
        // A Service that is not known yet takes its slices along when it comes.
        changed.retain(|service| tables.has(service));
        self.mark(changed);
    }

    fn absorb_node(&mut self, event: watcher::Event<Node>) {
        match event {
            watcher::Event::Init => self.relists.nodes.begin(true),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.relists.nodes.name(|| object.metadata.name.clone());
                if self.pod_network == PodNetwork::Own {
                    self.overlay.apply_node(&object);
                }
                self.enter_node(&object);
                if self.reconciler.tables.is_own(&object) {
                    self.shared.health.lock().set_node(&object);
                    let changed = self.reconciler.tables.apply_node(&object);
                    self.mark(changed);
                }
            }
            watcher::Event::Delete(object) => {
                if let Some(name) = &object.metadata.name {
                    self.forget_node(name);
                }
            }
            watcher::Event::InitDone => {
                let first = !self.relists.nodes.known;
                let nodes = &self.peers.nodes;
                let known = || nodes.keys().map(|name| name.to_string()).collect();
                for name in self.relists.nodes.finish_from(known) {
                    self.forget_node(&name);
                }
                if first {
                    self.recall_silent();
                }
                self.peers.tell.send_replace(self.peers.nodes.clone());
            }
        }
    }

    /// Where the other nodes are asked whether they live. A Node's heartbeat changes nothing of that.
    fn enter_node(&mut self, object: &Node) {
        let Some(name) = object.metadata.name.as_deref() else { return };
        let peers = &mut self.peers;
        let changed = match peers::address_of(object, peers.like) {
            Some(address) if peers.nodes.get(name) == Some(&address) => false,
            Some(address) => {
                peers.nodes.insert(name.into(), address);
                true
            }
            None => peers.nodes.remove(name).is_some(),
        };
        if changed && self.relists.nodes.known {
            peers.tell.send_replace(peers.nodes.clone());
        }
    }

    fn forget_node(&mut self, name: &str) {
        self.overlay.delete_node(name);
        if self.peers.nodes.remove(name).is_some() && self.relists.nodes.known {
            self.peers.tell.send_replace(self.peers.nodes.clone());
        }
    }

    /// What an earlier agent believed holds from the first synchronisation on.
    fn recall_silent(&mut self) {
        match self.peers.memory.load() {
            Ok(believed) => {
                let silent = self.peers.nodes.iter().filter(|(_, address)| believed.contains(address));
                let changed = self.reconciler.tables.set_silent(silent.map(|(name, _)| &**name));
                self.mark(changed);
            }
            // Who asks the nodes has the same trouble, and tells of it.
            Err(error) => tracing::debug!(%error, "what is known of silent nodes can't be read"),
        }
    }

    /// Takes in which nodes don't answer.
    pub(super) fn take_silent(&mut self) {
        let silent = self.peers.silent.borrow_and_update().clone();
        let changed = self.reconciler.tables.set_silent(silent.keys().map(|name| &**name));
        tracing::debug!(silent = silent.len(), services = changed.len(), "other nodes' answers have changed");
        self.mark(changed);
    }
}

/// An object. Of one that can't be read `unreadable` is told its namespace and name: it is left as it is known.
fn decode<'a, T: Deserialize<'a>>(json: &'a [u8], unreadable: impl FnOnce(&str, &str)) -> Option<T> {
    match serde_json::from_slice(json) {
        Ok(object) => Some(object),
        Err(error) => {
            let anything = serde_json::from_slice::<wire::Anything<'_>>(json).unwrap_or_default();
            let (namespace, name) = anything.names().unwrap_or_default();
            tracing::warn!(%error, namespace, name, "cannot read an object, it is left out");
            unreadable(namespace, name);
            None
        }
    }
}

/// An event whenever a value changes, for as long as somebody may change it.
fn turns<T: Send + Sync + 'static>(
    value: &watch::Receiver<T>,
    event: fn() -> Event,
) -> BoxStream<'static, Event> {
    let next = move |mut value: watch::Receiver<T>| async move {
        value.changed().await.ok()?;
        Some((event(), value))
    };
    stream::unfold(value.clone(), next).boxed()
}

/// What the kernel says.
pub(super) fn network(changes: weft_cni_netlink::Events) -> BoxStream<'static, Event> {
    let next = |mut changes: weft_cni_netlink::Events| async {
        Some((Event::Network(changes.next().await), changes))
    };
    stream::unfold(changes, next).boxed()
}

/// What is watched from the beginning.
pub(super) fn sources(client: &Client) -> SelectAll<BoxStream<'static, Event>> {
    let mut all = SelectAll::new();
    all.push(feed::<EndpointSlice>(client, "endpointslices").map(Event::Slice).boxed());
    all.push(source(Api::all(client.clone()), Event::Node, "nodes"));
    all
}

/// What is watched once all of that is known: each Service comes when its endpoints are there.
pub(super) fn services(client: &Client) -> BoxStream<'static, Event> {
    feed::<Service>(client, "services").map(Event::Service).boxed()
}
