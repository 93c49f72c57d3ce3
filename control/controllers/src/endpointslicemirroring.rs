//! Owns the mirroring of Endpoints that somebody writes by hand, for a Service without selector, to EndpointSlices.

mod plan;

use crate::endpointslice::reconcile::MANAGED_BY;
use crate::endpointslice::writer::{STALE_FOR, Writer};
use crate::error::SyncError;
use crate::shared::{BY_SERVICE, SERVICE_NAME, Shared};
use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use plan::MAX_ENDPOINTS;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::ObjectKey;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};

/// Upstream's `--mirroring-concurrent-service-endpoint-syncs`.
const WORKERS: usize = 5;
const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Endpoints that once were the lock of a leader election.
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";

/// The controller.
pub(crate) struct Controller {
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Queue<ObjectKey>,
    writer: Writer,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>, recorder: Recorder) -> Self {
        let queue = Queue::default();
        let to = queue.clone();
        shared.endpoints.on_change(move |change| to.add(ObjectKey::of(&change.object().metadata)));
        let to = queue.clone();
        shared.services.on_change(move |change| to.add(ObjectKey::of(&change.object().metadata)));
        let to = queue.clone();
        shared.endpoint_slices.on_change(move |change| {
            let slice = change.object();
            let labels = slice.metadata.labels.as_ref();
            let of = labels.and_then(|labels| labels.get(SERVICE_NAME)).filter(|_| is_ours(slice));
            if let Some(name) = of {
                to.add(ObjectKey::new(slice.metadata.namespace.as_deref().unwrap_or_default(), name));
            }
        });
        let writer = Writer::new(client, shared.clone());
        Self { shared, recorder, queue, writer }
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.services.synced().await;
        self.shared.endpoints.synced().await;
        self.shared.endpoint_slices.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let slices =
            self.shared.endpoint_slices.by_index(BY_SERVICE, &format!("{}/{}", key.namespace, key.name));
        let slices: Vec<_> = slices
            .into_iter()
            .filter(|slice| is_ours(slice) && slice.metadata.deletion_timestamp.is_none())
            .collect();
        let service = self.shared.services.by_key(&key);
        let endpoints = self.shared.endpoints.by_key(&key).filter(|one| {
            one.metadata.deletion_timestamp.is_none()
                && is_mirrored(one)
                && service.is_some_and(|s| is_open(&s))
        });
        if endpoints.is_none() && slices.is_empty() {
            return Ok(Outcome::Done);
        }
        if self.writer.is_stale(&key) {
            // The slice event that is missing brings the Endpoints back; this is for when it never comes.
            return Ok(Outcome::After(STALE_FOR));
        }
        let (plan, skipped) = plan::plan(endpoints.as_deref(), &slices);
        if let Some(endpoints) = endpoints.filter(|_| !plan.is_empty()) {
            self.tell(&endpoints, skipped);
        }
        self.writer.apply(&key, plan).await?;
        Ok(Outcome::Done)
    }

    fn tell(&self, endpoints: &Endpoints, skipped: plan::Skipped) {
        let about = || reference(endpoints);
        if skipped.invalid > 0 {
            let message =
                format!("Skipped {} invalid IP addresses when mirroring to EndpointSlices", skipped.invalid);
            self.recorder.event(about(), Kind::Warning, "InvalidIPAddress", message);
        }
        if skipped.excess > 0 {
            let message = format!(
                "A max of {MAX_ENDPOINTS} addresses can be mirrored to EndpointSlices per Endpoints subset. {} \
                 addresses were skipped",
                skipped.excess
            );
            self.recorder.event(about(), Kind::Warning, "TooManyAddressesToMirror", message);
        }
    }
}

fn is_ours(slice: &EndpointSlice) -> bool {
    let labels = slice.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|manager| manager == MANAGER)
}

/// Whether a Service leaves its endpoints to others.
fn is_open(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| spec.selector.is_none())
}

fn is_mirrored(endpoints: &Endpoints) -> bool {
    let has = |map: &Option<BTreeMap<String, String>>, key: &str, wanted: Option<&str>| {
        let found = map.as_ref().and_then(|map| map.get(key));
        found.is_some_and(|found| wanted.is_none_or(|wanted| found == wanted))
    };
    !has(&endpoints.metadata.labels, SKIP_MIRROR, Some("true"))
        && !has(&endpoints.metadata.annotations, LEADER, None)
}
