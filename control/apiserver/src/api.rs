//! Owns what all requests share: configuration, store, cache, authenticators, authorizers, metrics.

use crate::authn::Tokens;
use crate::authz::Authorizer;
use crate::backend::BackendProxy;
use crate::cache::{Cache, Item};
use crate::config::Config;
use crate::kubelet::KubeletProxy;
use crate::metrics::Metrics;
use crate::resources::{Resource, Resources};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_api::status::Status;
use weft_control_store::{Error as StoreError, Store};

/// What all requests share.
pub(crate) struct Api {
    /// What the server was told at its start.
    pub(crate) config: Config,
    /// The store.
    pub(crate) store: Arc<dyn Store>,
    /// The cache of the store.
    pub(crate) cache: Arc<Cache>,
    /// Which resources there are.
    pub(crate) resources: Arc<Resources>,
    /// Service-account tokens.
    pub(crate) tokens: Tokens,
    /// Who may do what.
    pub(crate) authorizer: Authorizer,
    /// Counters.
    pub(crate) metrics: Metrics,
    /// The way to kubelets.
    pub(crate) kubelet: Option<KubeletProxy>,
    /// The way to pods and Services.
    pub(crate) backends: BackendProxy,
    /// Whether bootstrapping is done; told by `/readyz`.
    pub(crate) bootstrapped: std::sync::atomic::AtomicBool,
    /// Ends watches, so that connections can drain.
    pub(crate) closing: CancellationToken,
    /// Ends everything else.
    pub(crate) shutdown: CancellationToken,
}

/// The answer to a failure of the store.
pub(crate) fn store_failure(error: StoreError) -> Status {
    match error {
        StoreError::Compacted { .. } => {
            Status::expired("The resourceVersion for the provided list is too old.")
        }
        StoreError::Future { requested, current } => too_large(requested.0, current.0),
        StoreError::Unavailable { .. } => {
            tracing::warn!(error = %crate::cache::Chain(&error), "the store is unavailable");
            Status::service_unavailable("the store is unavailable")
        }
        // The enum may grow; what isn't told apart is the server's own failure.
        StoreError::Invalid(_) | StoreError::Lagged | StoreError::Damaged(_) | _ => failed(&error),
    }
}

fn failed(error: &StoreError) -> Status {
    tracing::error!(error = %crate::cache::Chain(error), "the store failed");
    Status::internal(error)
}

/// The answer to a revision that isn't there yet.
pub(crate) fn too_large(requested: u64, current: u64) -> Status {
    Status::timeout(&format!("Too large resource version: {requested}, current: {current}"), 1)
}

impl Api {
    /// Waits until the cache shows everything that was committed before this call.
    pub(crate) async fn freshen(&self) -> Result<(), Status> {
        let revision = self.store.current_revision().await.map_err(store_failure)?;
        tokio::select! {
            () = self.cache.wait_for(revision.0) => Ok(()),
            () = self.shutdown.cancelled() => Err(Status::service_unavailable("the server is shutting down")),
        }
    }

    /// One object, as of now.
    pub(crate) async fn fresh(&self, resource: &Resource, key: &str) -> Result<Option<Arc<Item>>, Status> {
        self.freshen().await?;
        Ok(self.cache.get(resource.id, key))
    }

    /// One object as the cache has it.
    pub(crate) fn cached(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Arc<Item>> {
        let resource = self.resources.by_plural(group, plural)?;
        self.cache.get(resource.id, &object_key(namespace, name))
    }
}

/// The key of an object within its resource.
pub(crate) fn object_key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

impl Resource {
    /// The key of an object in the store.
    pub(crate) fn store_key(&self, key: &str) -> String {
        format!("{}{}{key}", crate::cache::PREFIX, self.prefix)
    }
}
