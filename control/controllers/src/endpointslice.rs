//! Owns the EndpointSlice controller.

pub(crate) mod build;
pub(crate) mod reconcile;
pub(crate) mod writer;

use crate::claim;
use crate::error::SyncError;
use crate::pod;
use crate::shared::{BY_SERVICE, Shared};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use reconcile::{MANAGED_BY, MANAGER, Plan};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::ObjectKey;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use writer::{STALE_FOR, Writer};

/// Upstream's `--concurrent-service-endpoint-syncs`.
const WORKERS: usize = 5;
/// The controller.
pub(crate) struct Controller {
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
    writer: Writer,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Arc<Self> {
        let controller = Arc::new(Self {
            shared: shared.clone(),
            queue: Queue::default(),
            writer: Writer::new(client, shared.clone()),
        });
        requeue_on_change(&shared, &controller.queue);
        let queue = controller.queue.clone();
        shared.endpoint_slices.on_change(move |change| {
            if let Some(service) = service_of(change.object()) {
                queue.add(service);
            }
        });
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.services.synced().await;
        self.shared.pods.synced().await;
        self.shared.nodes.synced().await;
        self.shared.endpoint_slices.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let slices: Vec<_> = self
            .shared
            .endpoint_slices
            .by_index(BY_SERVICE, &format!("{}/{}", key.namespace, key.name))
            .into_iter()
            .filter(|s| is_ours(s) && s.metadata.deletion_timestamp.is_none())
            .collect();
        if self.writer.is_stale(&key) {
            // The slice event that is missing brings the Service back; this is for when it never comes.
            return Ok(Outcome::After(STALE_FOR));
        }
        // The slices of a Service that is gone are collected through their owner reference.
        let Some(service) = self.shared.services.by_key(&key) else { return Ok(Outcome::Done) };
        if service.metadata.deletion_timestamp.is_some() {
            return Ok(Outcome::Done);
        }
        let Some(pods) = selected(&self.shared, &service) else { return Ok(Outcome::Done) };
        let trigger = trigger_time(&service, &pods);
        let mut node_missing = false;
        let families = families(&service);
        // A family that the Service had goes with its slices.
        let gone = slices.iter().filter(|s| !families.contains(&s.address_type)).cloned().collect();
        self.writer.apply(&key, Plan { delete: gone, ..Plan::default() }).await?;
        for family in families {
            let of_family: Vec<_> = slices.iter().filter(|s| s.address_type == family).cloned().collect();
            let node = |name: &str| self.shared.nodes.get("", name);
            let (wanted, missing) = build::wanted(&service, &pods, &family, node);
            node_missing |= missing;
            let plan = reconcile::plan(&service, &family, &of_family, wanted, trigger.as_deref());
            self.writer.apply(&key, plan).await?;
        }
        Ok(if node_missing { Outcome::Again } else { Outcome::Done })
    }
}

fn is_ours(slice: &EndpointSlice) -> bool {
    let labels = slice.metadata.labels.as_ref();
    labels.and_then(|l| l.get(MANAGED_BY)).is_some_and(|manager| manager == MANAGER)
}

fn service_of(slice: &EndpointSlice) -> Option<ObjectKey> {
    let service = slice.metadata.labels.as_ref()?.get(crate::shared::SERVICE_NAME)?;
    is_ours(slice).then(|| ObjectKey::new(slice.metadata.namespace.as_deref().unwrap_or_default(), service))
}

fn families(service: &Service) -> Vec<String> {
    let spec = service.spec.as_ref();
    let families = spec.and_then(|s| s.ip_families.clone()).filter(|f| !f.is_empty());
    families.unwrap_or_else(|| {
        let v6 = spec.and_then(|s| s.cluster_ip.as_ref()).is_some_and(|ip| ip.contains(':'));
        vec![if v6 { "IPv6" } else { "IPv4" }.to_owned()]
    })
}

/// The pods that a Service selects; `None` if it selects none on purpose (no selector, ExternalName).
pub(crate) fn selected(shared: &Shared, service: &Service) -> Option<Vec<Arc<Pod>>> {
    let selector = selector_of(service)?;
    let pods = shared.pods.in_namespace(service.metadata.namespace.as_deref().unwrap_or_default());
    Some(pods.into_iter().filter(|p| claim::matches(&selector, &p.metadata)).collect())
}

fn selector_of(service: &Service) -> Option<kube::core::Selector> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    // Upstream: a missing selector means endpoints by hand; an empty one selects every pod.
    Some(spec.selector.clone()?.into_iter().collect())
}

/// Queues the Services that a change of a Service, a pod or a node may matter to.
pub(crate) fn requeue_on_change(shared: &Arc<Shared>, queue: &Queue<ObjectKey>) {
    let to = queue.clone();
    shared.services.on_change(move |change| to.add(ObjectKey::of(&change.object().metadata)));
    let (to, weak) = (queue.clone(), Arc::downgrade(shared));
    shared.pods.on_change(move |change| {
        if let Some(shared) = weak.upgrade() {
            pod_changed(&shared, &to, change);
        }
    });
    let (to, weak) = (queue.clone(), Arc::downgrade(shared));
    shared.nodes.on_change(move |change| {
        let labels_same = matches!(change, Change::Applied { old: Some(old), new }
            if old.metadata.labels == new.metadata.labels);
        if let (Some(shared), false) = (weak.upgrade(), labels_same) {
            let services = shared.services.list();
            services.iter().for_each(|s| to.add(ObjectKey::of(&s.metadata)));
        }
    });
}

fn pod_changed(shared: &Shared, queue: &Queue<ObjectKey>, change: &Change<Pod>) {
    let old = match change {
        Change::Applied { old: Some(old), new } if same_endpoint(old, new) => return,
        Change::Applied { old, .. } => old.as_ref(),
        Change::Deleted(_) => None,
    };
    let pod = change.object();
    for service in shared.services.in_namespace(pod.metadata.namespace.as_deref().unwrap_or_default()) {
        let Some(selector) = selector_of(&service) else { continue };
        let hit = |pod: &Pod| claim::matches(&selector, &pod.metadata);
        if hit(pod) || old.is_some_and(|old| hit(old)) {
            queue.add(ObjectKey::of(&service.metadata));
        }
    }
}

/// Whether two states of a pod make the same endpoint.
fn same_endpoint(a: &Pod, b: &Pod) -> bool {
    let shape = |pod: &Pod| {
        let spec = pod.spec.as_ref();
        let names = (spec.and_then(|s| s.hostname.clone()), spec.and_then(|s| s.subdomain.clone()));
        let ips = (build::addresses(pod, "IPv4"), build::addresses(pod, "IPv6"));
        let state = (pod::is_ready(pod), pod::is_terminal(pod), pod::is_terminating(pod));
        (names, ips, state, build::weight(&pod.metadata), pod::node_name(pod).to_owned())
    };
    a.metadata.labels == b.metadata.labels && a.metadata.uid == b.metadata.uid && shape(a) == shape(b)
}

/// When the newest change came about that these endpoints tell of (for latency measurements).
pub(crate) fn trigger_time(service: &Service, pods: &[Arc<Pod>]) -> Option<String> {
    let ready = pods.iter().filter_map(|p| {
        let at = pod::condition(p, "Ready").and_then(|c| c.last_transition_time.as_ref());
        at.or(p.metadata.creation_timestamp.as_ref())
    });
    let newest = ready.chain(&service.metadata.creation_timestamp).map(|t| t.0).max()?;
    Some(newest.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}
