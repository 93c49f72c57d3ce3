//! Owns what every namespace gets: the service account `default` and the cluster's CA.

use crate::error::{Doing, SyncError};
use crate::shared::{ROOT_CA, Shared};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use kube::Client;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{Class, ObjectKey, classify};

const DEFAULT_ACCOUNT: &str = "default";
const CA_KEY: &str = "ca.crt";
const DESCRIPTION: &str = "kubernetes.io/description";

fn is_active(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_none()
}

/// Gives each namespace its default service account.
pub(crate) struct ServiceAccounts {
    client: Client,
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
}

impl ServiceAccounts {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Self {
        let queue = Queue::default();
        let to = queue.clone();
        shared.namespaces.on_change(move |change| to.add(ObjectKey::of(&change.object().metadata)));
        let to = queue.clone();
        shared.service_accounts.on_change(move |change| to.add(namespace_of(&change.object().metadata)));
        Self { client, shared, queue }
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.namespaces.synced().await;
        self.shared.service_accounts.synced().await;
        work(&self.queue, 1, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let there = self.shared.service_accounts.get(&key.name, DEFAULT_ACCOUNT).is_some();
        if there || !self.shared.namespaces.by_key(&key).is_some_and(|n| is_active(&n)) {
            return Ok(Outcome::Done);
        }
        let account = ServiceAccount { metadata: metadata(&key.name, DEFAULT_ACCOUNT), ..Default::default() };
        let api = Api::namespaced(self.client.clone(), &key.name);
        created(
            api.create(&PostParams::default(), &account).await,
            "create the default service account of",
            &key,
        )
    }
}

/// Gives each namespace the cluster's CA.
pub(crate) struct RootCas {
    client: Client,
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
    pem: String,
}

impl RootCas {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>, pem: String) -> Self {
        let queue = Queue::default();
        let to = queue.clone();
        shared.namespaces.on_change(move |change| to.add(ObjectKey::of(&change.object().metadata)));
        let to = queue.clone();
        shared.root_cas.on_change(move |change| to.add(namespace_of(&change.object().metadata)));
        Self { client, shared, queue, pem }
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.namespaces.synced().await;
        self.shared.root_cas.synced().await;
        work(&self.queue, 1, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        if !self.shared.namespaces.by_key(&key).is_some_and(|n| is_active(&n)) {
            return Ok(Outcome::Done);
        }
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &key.name);
        let Some(existing) = self.shared.root_cas.get(&key.name, ROOT_CA) else {
            let mut metadata = metadata(&key.name, ROOT_CA);
            let text =
                "The CA bundle to verify the API server with when it is called from inside the cluster.";
            metadata.annotations = Some([(DESCRIPTION.to_owned(), text.to_owned())].into());
            let data = Some([(CA_KEY.to_owned(), self.pem.clone())].into());
            let map = ConfigMap { metadata, data, ..ConfigMap::default() };
            let result = api.create(&PostParams::default(), &map).await;
            return created(result, "publish the root CA in", &key);
        };
        let data = existing.data.as_ref();
        if data.is_some_and(|d| d.len() == 1 && d.get(CA_KEY) == Some(&self.pem)) {
            return Ok(Outcome::Done);
        }
        let mut wanted: serde_json::Map<_, _> =
            data.into_iter().flatten().map(|(k, _)| (k.clone(), json!(null))).collect();
        wanted.insert(CA_KEY.into(), json!(self.pem));
        let patch = Patch::Merge(json!({"data": wanted}));
        let patched = api.patch(ROOT_CA, &PatchParams::default(), &patch).await;
        match patched {
            Err(error) if classify(&error) == Class::NotFound => Ok(Outcome::Again),
            patched => patched.doing("restore the root CA in", &key).map(|_| Outcome::Done),
        }
    }
}

fn namespace_of(meta: &ObjectMeta) -> ObjectKey {
    ObjectKey::new("", meta.namespace.as_deref().unwrap_or_default())
}

fn metadata(namespace: &str, name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.into()), namespace: Some(namespace.into()), ..ObjectMeta::default() }
}

fn created<T>(result: kube::Result<T>, doing: &'static str, key: &ObjectKey) -> Result<Outcome, SyncError> {
    match result {
        Ok(_) => Ok(Outcome::Done),
        Err(error) => match classify(&error) {
            // The namespace is going or gone, or the cache is behind: an event follows.
            Class::AlreadyExists | Class::NamespaceTerminating | Class::NotFound => Ok(Outcome::Done),
            Class::Conflict | Class::Rejected | Class::Expired | Class::Retry => Err(error).doing(doing, key),
        },
    }
}
