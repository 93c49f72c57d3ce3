//! Keeps the index in step with the API's Services and EndpointSlices.

use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use kube::ResourceExt as _;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use parking_lot::RwLock;

use crate::index::{Endpoint, Index, Port, Service, Slice, Target};

const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Watches until it is dropped.
pub(crate) async fn keep(client: kube::Client, index: Arc<RwLock<Index>>) {
    let services = Kind::<core::Service> {
        apply: |index, (namespace, name), object| match service(object) {
            Some(service) => index.put_service(namespace, name, service),
            None => index.remove_service(namespace, name),
        },
        remove: Index::remove_service,
        listed: Index::set_services_listed,
    };
    let slices = Kind::<discovery::EndpointSlice> {
        apply: |index, (namespace, name), object| match slice(object) {
            Some(slice) => index.put_slice(namespace, name, slice),
            None => index.remove_slice(namespace, name),
        },
        remove: Index::remove_slice,
        listed: Index::set_slices_listed,
    };
    tokio::join!(follow(client.clone(), &index, services), follow(client, &index, slices));
}

/// How a kind of object gets into the index and out of it.
struct Kind<K> {
    apply: fn(&mut Index, (&str, &str), &K),
    remove: fn(&mut Index, &str, &str),
    listed: fn(&mut Index),
}

async fn follow<K>(client: kube::Client, index: &RwLock<Index>, kind: Kind<K>)
where
    K: kube::Resource<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Send
        + serde::de::DeserializeOwned
        + 'static,
{
    let events = watcher::watcher(kube::Api::<K>::all(client), watcher::Config::default()).default_backoff();
    let mut relist = Relist::default();
    let mut events = events.inspect_err(report).boxed();
    while let Some(event) = events.next().await {
        let Ok(event) = event else { continue };
        let mut index = index.write();
        match event {
            Event::Init => relist.begin(),
            Event::Apply(object) | Event::InitApply(object) => {
                let (namespace, name) = key(&object);
                relist.saw(&namespace, &name);
                (kind.apply)(&mut index, (&namespace, &name), &object);
            }
            Event::Delete(object) => {
                let (namespace, name) = key(&object);
                relist.forget(&namespace, &name);
                (kind.remove)(&mut index, &namespace, &name);
            }
            Event::InitDone => {
                for (namespace, name) in relist.gone() {
                    (kind.remove)(&mut index, &namespace, &name);
                }
                (kind.listed)(&mut index);
            }
        }
    }
}

fn report(error: &watcher::Error) {
    tracing::warn!(%error, "the cluster DNS lost its watch and tries again");
}

fn key<K: kube::Resource>(object: &K) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

type Names = std::collections::HashSet<(String, String)>;

/// Finds what a new list no longer has, since it tells only what is there.
#[derive(Default)]
struct Relist {
    known: Names,
    seen: Option<Names>,
}

impl Relist {
    fn begin(&mut self) {
        self.seen = Some(Names::new());
    }

    fn saw(&mut self, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        match &mut self.seen {
            Some(seen) => seen.insert(key),
            None => self.known.insert(key),
        };
    }

    fn forget(&mut self, namespace: &str, name: &str) {
        self.known.remove(&(namespace.to_owned(), name.to_owned()));
    }

    fn gone(&mut self) -> Names {
        let seen = self.seen.take().unwrap_or_default();
        let known = std::mem::replace(&mut self.known, seen);
        known.difference(&self.known).cloned().collect()
    }
}

fn service(object: &core::Service) -> Option<Service> {
    let spec = object.spec.as_ref()?;
    let target = if spec.type_.as_deref() == Some("ExternalName") {
        Target::Alias(spec.external_name.clone()?)
    } else if spec.cluster_ip.as_deref() == Some("None") {
        Target::Endpoints
    } else {
        let addresses = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
        let mut addresses: Vec<_> = addresses.filter_map(|address| address.parse().ok()).collect();
        addresses.dedup();
        addresses.sort_unstable();
        addresses.dedup();
        Target::Addresses(addresses)
    };
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let name = port.name.clone().unwrap_or_default();
        self::port(name, port.protocol.as_deref(), port.port)
    });
    Some(Service {
        target,
        ports: ports.collect(),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
    })
}

fn slice(object: &discovery::EndpointSlice) -> Option<Slice> {
    let service = object.labels().get(SERVICE_LABEL)?.clone();
    let endpoints = object.endpoints.iter().flatten().flat_map(|endpoint| {
        // KEP-1672: a condition that isn't set counts as true.
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
        endpoint.addresses.iter().filter_map(move |address| {
            Some(Endpoint { address: address.parse().ok()?, hostname: endpoint.hostname.clone(), ready })
        })
    });
    let ports = object.ports.iter().flatten().filter_map(|port| {
        self::port(port.name.clone().unwrap_or_default(), port.protocol.as_deref(), port.port?)
    });
    Some(Slice { service, endpoints: endpoints.collect(), ports: ports.collect() })
}

fn port(name: String, protocol: Option<&str>, port: i32) -> Option<Port> {
    let protocol = protocol.unwrap_or("TCP").to_ascii_lowercase();
    Some(Port { name, protocol, port: u16::try_from(port).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_list_drops_what_it_no_longer_has() {
        let mut relist = Relist::default();
        relist.begin();
        relist.saw("default", "a");
        relist.saw("default", "b");
        assert!(relist.gone().is_empty());
        relist.saw("default", "c");
        relist.forget("default", "a");
        relist.begin();
        relist.saw("default", "c");
        assert_eq!(relist.gone(), Names::from([("default".to_owned(), "b".to_owned())]));
    }
}
