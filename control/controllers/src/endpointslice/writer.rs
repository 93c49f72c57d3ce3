//! Owns the writing of slices, and the knowledge of what was written and isn't shown by the cache yet.

use super::reconcile::Plan;
use crate::error::{Doing, SyncError};
use crate::shared::Shared;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, DeleteParams, PostParams};
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use weft_control_client::{Class, ObjectKey, classify, found};

/// How long a sync waits for the cache to show the writes of the one before; then it works from what there is.
pub(crate) const STALE_FOR: Duration = Duration::from_secs(10);

/// Written, and not shown by the cache yet.
#[derive(Default)]
struct Pending {
    /// Resource version that each written slice must have reached, by name.
    written: HashMap<String, Option<String>>,
    deleted: BTreeSet<String>,
    since: Option<Instant>,
}

/// Writes the slices of one controller.
pub(crate) struct Writer {
    client: Client,
    shared: Arc<Shared>,
    pending: Mutex<HashMap<ObjectKey, Pending>>,
}

impl Writer {
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Self {
        Self { client, shared, pending: Mutex::default() }
    }

    /// Carries out a plan. The objects that it makes belong to `key`.
    pub(crate) async fn apply(&self, key: &ObjectKey, plan: Plan) -> Result<(), SyncError> {
        if plan.is_empty() {
            return Ok(());
        }
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = PostParams::default();
        for slice in &plan.create {
            match api.create(&params, slice).await {
                Ok(written) => self.wrote(key, &written),
                Err(e) if classify(&e) == Class::NamespaceTerminating => return Ok(()),
                Err(error) => return Err(error).doing("create an endpoint slice for service", key),
            }
        }
        for slice in &plan.update {
            let name = slice.metadata.name.as_deref().unwrap_or_default();
            let written = api.replace(name, &params, slice).await.doing("update endpoint slice", name)?;
            self.wrote(key, &written);
        }
        for slice in &plan.delete {
            let name = slice.metadata.name.as_deref().unwrap_or_default();
            let deleted = api.delete(name, &DeleteParams::default()).await.map(|_| ());
            found(deleted).doing("delete endpoint slice", name)?;
            let mut pending = self.pending.lock();
            let pending = pending.entry(key.clone()).or_default();
            pending.deleted.insert(name.to_owned());
            pending.since = Some(Instant::now());
        }
        Ok(())
    }

    fn wrote(&self, key: &ObjectKey, slice: &EndpointSlice) {
        let mut pending = self.pending.lock();
        let pending = pending.entry(key.clone()).or_default();
        let name = slice.metadata.name.clone().unwrap_or_default();
        pending.written.insert(name, slice.metadata.resource_version.clone());
        pending.since = Some(Instant::now());
    }

    /// Whether the cache lacks a write of ours. A slice that is newer than ours, or gone, counts as shown.
    pub(crate) fn is_stale(&self, key: &ObjectKey) -> bool {
        let mut all = self.pending.lock();
        let Some(pending) = all.get_mut(key) else { return false };
        let too_old = pending.since.is_none_or(|since| since.elapsed() > STALE_FOR);
        let version = |name: &str| {
            let slice = self.shared.endpoint_slices.get(&key.namespace, name)?;
            slice.metadata.resource_version.as_ref()?.parse::<u64>().ok()
        };
        let behind = |(name, written): (&String, &Option<String>)| {
            let written = written.as_ref().and_then(|v| v.parse::<u64>().ok());
            version(name) < written
        };
        let stale =
            pending.written.iter().any(behind) || pending.deleted.iter().any(|n| version(n).is_some());
        if too_old || !stale {
            all.remove(key);
            return false;
        }
        true
    }
}
