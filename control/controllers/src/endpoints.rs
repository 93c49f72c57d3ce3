//! Owns the Endpoints controller, for readers that don't know EndpointSlices.

use crate::endpointslice::build::{self, Port, Ports};
use crate::endpointslice::{requeue_on_change, selected, trigger_time};
use crate::error::{Doing, SyncError};
use crate::pod;
use crate::shared::Shared;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service};
use kube::Client;
use kube::api::{Api, DeleteParams, ObjectMeta, PostParams};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{Class, ObjectKey, classify, found};

/// Upstream's `--concurrent-endpoint-syncs`.
const WORKERS: usize = 5;
/// Addresses in one object; more make it too large to be written often.
const MAX_ADDRESSES: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Arc<Self> {
        let queue = Queue::default();
        requeue_on_change(&shared, &queue);
        let to = queue.clone();
        shared.endpoints.on_change(move |change| to.add(ObjectKey::of(&change.object().metadata)));
        Arc::new(Self { client, shared, queue })
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.services.synced().await;
        self.shared.pods.synced().await;
        self.shared.endpoints.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let api: Api<Endpoints> = Api::namespaced(self.client.clone(), &key.namespace);
        let existing = self.shared.endpoints.by_key(&key);
        let Some(service) = self.shared.services.by_key(&key) else {
            if existing.is_some_and(|e| is_ours(&e)) {
                let deleted = api.delete(&key.name, &DeleteParams::default()).await.map(|_| ());
                found(deleted).doing("delete endpoints", &key)?;
            }
            return Ok(Outcome::Done);
        };
        let Some(pods) = selected(&self.shared, &service) else { return Ok(Outcome::Done) };
        let Some(wanted) = plan(&service, &pods, existing.as_deref()) else { return Ok(Outcome::Done) };
        let written = if existing.is_some() {
            api.replace(&key.name, &PostParams::default(), &wanted).await
        } else {
            api.create(&PostParams::default(), &wanted).await
        };
        match written {
            Ok(_) => Ok(Outcome::Done),
            Err(error) => match classify(&error) {
                Class::NamespaceTerminating => Ok(Outcome::Done),
                Class::Conflict | Class::AlreadyExists | Class::NotFound => Ok(Outcome::Again),
                Class::Rejected | Class::Expired | Class::Retry => Err(error).doing("write endpoints", &key),
            },
        }
    }
}

fn is_ours(endpoints: &Endpoints) -> bool {
    let labels = endpoints.metadata.labels.as_ref();
    labels.and_then(|l| l.get(MANAGED_BY)).is_some_and(|manager| manager == MANAGER)
}

/// The object to write, if it differs from what is there.
fn plan(service: &Service, pods: &[Arc<Pod>], existing: Option<&Endpoints>) -> Option<Endpoints> {
    let (subsets, truncated) = subsets(service, pods);
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS);
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    if build::is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    let mut wanted = existing.cloned().unwrap_or_else(|| Endpoints {
        metadata: ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            ..ObjectMeta::default()
        },
        subsets: None,
    });
    let annotations = wanted.metadata.annotations.get_or_insert_default();
    if truncated {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    wanted.metadata.labels = Some(labels);
    wanted.subsets = Some(subsets);
    let none = EndpointsView::default();
    if existing.map_or(none, view) == view(&wanted) && existing.is_some() {
        return None;
    }
    let annotations = wanted.metadata.annotations.get_or_insert_default();
    match trigger_time(service, pods) {
        Some(time) => annotations.insert(TRIGGER_TIME.into(), time),
        None => annotations.remove(TRIGGER_TIME),
    };
    Some(wanted)
}

type EndpointsView = (BTreeMap<String, String>, Option<String>, Vec<EndpointSubset>);

/// What matters in a comparison: everything but the trigger time.
fn view(endpoints: &Endpoints) -> EndpointsView {
    let capacity = endpoints.metadata.annotations.as_ref().and_then(|a| a.get(OVER_CAPACITY).cloned());
    let labels = endpoints.metadata.labels.clone().unwrap_or_default();
    (labels, capacity, endpoints.subsets.clone().unwrap_or_default())
}

/// Pods grouped by the ports they serve, ready ones apart; and whether some had to be left out.
fn subsets(service: &Service, pods: &[Arc<Pod>]) -> (Vec<EndpointSubset>, bool) {
    let spec = service.spec.as_ref();
    let family = spec.and_then(|s| s.ip_families.as_ref()?.first().cloned()).unwrap_or_else(|| "IPv4".into());
    let publish = build::publishes_not_ready(service);
    let mut groups: BTreeMap<Ports, [Vec<EndpointAddress>; 2]> = BTreeMap::new();
    for pod in pods.iter().filter(|p| build::has_endpoint(p, publish)) {
        let address = build::addresses(pod, &family).into_iter().next();
        let (Some(ip), Some(ports)) = (address, build::ports(service, pod)) else { continue };
        let address = EndpointAddress {
            ip,
            node_name: Some(pod::node_name(pod)).filter(|n| !n.is_empty()).map(Into::into),
            target_ref: Some(build::target(pod)),
            hostname: build::hostname(service, pod),
        };
        let unready = usize::from(!(publish || pod::is_ready(pod)));
        groups.entry(ports).or_default()[unready].push(address);
    }
    let truncated = truncate(&mut groups);
    let subset = |(ports, [mut ready, mut unready]): (Ports, [Vec<EndpointAddress>; 2])| {
        ready.sort_by(|a, b| a.ip.cmp(&b.ip));
        unready.sort_by(|a, b| a.ip.cmp(&b.ip));
        EndpointSubset {
            addresses: (!ready.is_empty()).then_some(ready),
            not_ready_addresses: (!unready.is_empty()).then_some(unready),
            ports: (!ports.0.is_empty()).then(|| ports.0.iter().map(port).collect()),
        }
    };
    let all = groups.into_iter().filter(|(_, [a, b])| !(a.is_empty() && b.is_empty()));
    (all.map(subset).collect(), truncated)
}

/// Cuts down to what one object may hold; ready addresses stay longest.
fn truncate(groups: &mut BTreeMap<Ports, [Vec<EndpointAddress>; 2]>) -> bool {
    let (mut room, mut truncated) = (MAX_ADDRESSES, false);
    for kind in 0..2 {
        for addresses in groups.values_mut() {
            truncated |= addresses[kind].len() > room;
            addresses[kind].truncate(room);
            room -= addresses[kind].len();
        }
    }
    truncated
}

fn port(port: &Port) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone()).filter(|n| !n.is_empty()),
        port: port.port,
        protocol: Some(port.protocol.clone()),
        app_protocol: port.app_protocol.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpointslice::build::tests::{endpoint_pod, service};
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    fn web() -> Service {
        service(IntOrString::Int(8080))
    }

    #[test]
    fn ready_and_unready_pods_are_told_apart() {
        let pods = [endpoint_pod("b", "10.42.0.3", true), endpoint_pod("a", "10.42.0.2", true)];
        let pods = pods.into_iter().chain([endpoint_pod("c", "10.42.0.4", false)]).map(Arc::new);
        let pods: Vec<_> = pods.collect();
        let endpoints = plan(&web(), &pods, None).unwrap();
        let subset = &endpoints.subsets.as_ref().unwrap()[0];
        let ips = |a: &Option<Vec<EndpointAddress>>| -> Vec<String> {
            a.iter().flatten().map(|a| a.ip.clone()).collect()
        };
        assert_eq!(ips(&subset.addresses), ["10.42.0.2", "10.42.0.3"]);
        assert_eq!(ips(&subset.not_ready_addresses), ["10.42.0.4"]);
        assert_eq!(subset.ports.as_ref().unwrap()[0].port, 8080);
        assert!(plan(&web(), &pods, Some(&endpoints)).is_none());
    }

    #[test]
    fn a_service_without_pods_has_no_subsets() {
        let endpoints = plan(&web(), &[], None).unwrap();
        assert_eq!(endpoints.subsets, Some(vec![]));
        assert!(plan(&web(), &[], Some(&endpoints)).is_none());
    }

    #[test]
    fn more_than_a_thousand_are_cut_unready_first() {
        let ready =
            (0..990).map(|n| endpoint_pod(&format!("r{n}"), &format!("10.1.{}.{}", n / 250, n % 250), true));
        let rest = (0..20).map(|n| endpoint_pod(&format!("u{n}"), &format!("10.2.0.{n}"), false));
        let pods: Vec<_> = ready.chain(rest).map(Arc::new).collect();
        let endpoints = plan(&web(), &pods, None).unwrap();
        let subset = &endpoints.subsets.as_ref().unwrap()[0];
        assert_eq!(subset.addresses.as_ref().unwrap().len(), 990);
        assert_eq!(subset.not_ready_addresses.as_ref().unwrap().len(), 10);
        assert_eq!(endpoints.metadata.annotations.unwrap()[OVER_CAPACITY], "truncated");
    }
}
