//! What the watches say, taken into the tables: a watch's list names what exists, its events what changed.

use std::time::Instant;

use futures::stream::{BoxStream, SelectAll};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::watcher;
use kube::{Api, Client};

use super::{Dataplane, PodNetwork};
use crate::tables::{ServiceName, service_name, slice_name};
use crate::watch::{Relist, source};

/// Annotation with the time of the change that a slice carries on.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

#[expect(
    clippy::large_enum_variant,
    reason = "an event is taken apart as soon as it comes; a box would be one allocation more"
)]
pub(super) enum Event {
    Service(watcher::Event<Service>),
    Slice(watcher::Event<EndpointSlice>),
    Node(watcher::Event<Node>),
}

/// The lists in progress, one for each watch.
#[derive(Debug, Default)]
pub(super) struct Relists {
    services: Relist<ServiceName>,
    slices: Relist<(String, String)>,
    nodes: Relist<String>,
}

impl Relists {
    /// Whether every watch has listed once.
    pub(super) fn all_known(&self) -> bool {
        self.services.known && self.slices.known && self.nodes.known
    }
}

impl Dataplane {
    /// Takes in one event; the maps follow at the next synchronisation.
    pub(super) fn absorb(&mut self, event: Event) {
        let before = self.relists.all_known();
        match event {
            Event::Service(event) => self.absorb_service(event),
            Event::Slice(event) => self.absorb_slice(event),
            Event::Node(event) => self.absorb_node(event),
        }
        if !before && self.relists.all_known() {
            self.reconciler.sources_are_known();
        }
    }

    fn mark(&mut self, changed: Vec<ServiceName>) {
        if !changed.is_empty() {
            self.shared.health.lock().queued(Instant::now());
            self.reconciler.mark(changed);
        }
    }

    fn absorb_service(&mut self, event: watcher::Event<Service>) {
        let tables = &mut self.reconciler.tables;
        let changed: Vec<_> = match event {
            watcher::Event::Init => {
                self.relists.services.begin();
                return;
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.relists.services.name(service_name(&object));
                tables.apply_service(&object).into_iter().collect()
            }
            watcher::Event::Delete(object) => {
                service_name(&object).and_then(|name| tables.delete_service(&name)).into_iter().collect()
            }
            watcher::Event::InitDone => {
                let gone = self.relists.services.finish_from(tables.service_names());
                gone.iter().filter_map(|name| tables.delete_service(name)).collect()
            }
        };
        self.shared.metrics.services_changed(changed.len());
        self.mark(changed);
    }

    fn absorb_slice(&mut self, event: watcher::Event<EndpointSlice>) {
        let tables = &mut self.reconciler.tables;
        let changed: Vec<_> = match event {
            watcher::Event::Init => {
                self.relists.slices.begin();
                return;
            }
            watcher::Event::InitApply(object) => {
                self.relists.slices.name(slice_name(&object));
                tables.apply_slice(&object)
            }
            watcher::Event::Apply(object) => {
                let changed = tables.apply_slice(&object);
                let waiting = changed.iter().cloned();
                self.triggers.extend(
                    trigger_time(&object).into_iter().flat_map(|at| waiting.clone().map(move |s| (s, at))),
                );
                changed
            }
            watcher::Event::Delete(object) => slice_name(&object)
                .and_then(|(namespace, name)| tables.delete_slice(&namespace, &name))
                .into_iter()
                .collect(),
            watcher::Event::InitDone => {
                let gone = self.relists.slices.finish_from(tables.slice_names());
                gone.iter().filter_map(|(namespace, name)| tables.delete_slice(namespace, name)).collect()
            }
        };
        self.shared.metrics.endpoints_changed(changed.len());
        self.mark(changed);
    }

    fn absorb_node(&mut self, event: watcher::Event<Node>) {
        match event {
            watcher::Event::Init => self.relists.nodes.begin(),
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.relists.nodes.name(object.metadata.name.clone());
                if self.pod_network == PodNetwork::Own {
                    self.overlay.apply_node(&object);
                }
                if self.reconciler.tables.is_own(&object) {
                    self.shared.health.lock().set_node(&object);
                    let changed = self.reconciler.tables.apply_node(&object);
                    self.mark(changed);
                }
            }
            watcher::Event::Delete(object) => {
                if let Some(name) = &object.metadata.name {
                    self.overlay.delete_node(name);
                }
            }
            watcher::Event::InitDone => {
                for name in self.relists.nodes.finish_from(self.overlay.node_names()) {
                    self.overlay.delete_node(&name);
                }
            }
        }
    }
}

fn trigger_time(slice: &EndpointSlice) -> Option<Timestamp> {
    slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()
}

/// The three watches as one stream.
pub(super) fn sources(client: &Client) -> SelectAll<BoxStream<'static, Event>> {
    let mut all = SelectAll::new();
    all.push(source(Api::all(client.clone()), Event::Service, "services"));
    all.push(source(Api::all(client.clone()), Event::Slice, "endpointslices"));
    all.push(source(Api::all(client.clone()), Event::Node, "nodes"));
    all
}
