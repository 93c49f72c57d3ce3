//! Owns the load-balancer addresses: Services of type LoadBalancer get one from the cluster's pools, if it has any.
//!
//! A Service's status is the record of what it has. One worker gives addresses out, and remembers what the cache may not
//! show yet.

pub(crate) mod pool;

use crate::error::{Doing, SyncError};
use crate::shared::Shared;
use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::Service;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use parking_lot::Mutex;
use pool::{Holders, choose, claim};
use serde_json::json;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::recorder::{Kind, Recorder, reference};
use weft_control_client::{Class, ObjectKey, classify};

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    recorder: Recorder,
    queue: Queue<ObjectKey>,
    pools: Vec<IpNetwork>,
    /// Who has what, whether or not the cache shows it yet.
    holders: Mutex<Holders>,
    /// Those who asked and got nothing: an address given back may be theirs.
    waiting: Mutex<BTreeSet<ObjectKey>>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(
        client: Client,
        shared: Arc<Shared>,
        recorder: Recorder,
        pools: Vec<IpNetwork>,
    ) -> Arc<Self> {
        let queue = Queue::default();
        let to = queue.clone();
        shared.services.on_change(move |change| {
            let balanced = |service: &Service| {
                service.spec.as_ref().is_some_and(|spec| spec.type_.as_deref() == Some("LoadBalancer"))
            };
            let was = matches!(change, Change::Applied { old: Some(old), .. } if balanced(old));
            if was || balanced(change.object()) {
                to.add(ObjectKey::of(&change.object().metadata));
            }
        });
        let (holders, waiting) = (Mutex::default(), Mutex::default());
        Arc::new(Self { client, shared, recorder, queue, pools, holders, waiting })
    }

    /// One worker: addresses are given out one after the other.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        if self.pools.is_empty() {
            return shutdown.cancelled().await;
        }
        self.shared.services.synced().await;
        self.remember();
        work(&self.queue, 1, shutdown, |key| self.sync(key)).await;
    }

    /// What Services have from before.
    fn remember(&self) {
        let mut holders = self.holders.lock();
        for service in self.shared.services.list() {
            if let Some(claim) = claim(&service) {
                holders.insert(ObjectKey::of(&service.metadata), (claim, addresses(&service)));
            }
        }
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let service = self.shared.services.by_key(&key);
        let Some((service, claim)) = service.and_then(|one| claim(&one).map(|claim| (one, claim))) else {
            self.release(&key);
            return Ok(Outcome::Done);
        };
        let shown = addresses(&service);
        let has = self.holders.lock().get(&key).map_or_else(|| shown.clone(), |(_, has)| has.clone());
        let chosen = {
            let mut holders = self.holders.lock();
            let chosen = choose(&self.pools, &key, &claim, &has, &holders);
            let now = chosen.as_ref().cloned().unwrap_or_default();
            holders.insert(key.clone(), (claim, now));
            chosen
        };
        let (wanted, refusal) = match chosen {
            Ok(wanted) => (wanted, None),
            Err(refusal) => (Vec::new(), Some(refusal)),
        };
        if let Some(refusal) = refusal {
            self.waiting.lock().insert(key.clone());
            let message = format!("Error syncing load balancer: {refusal}");
            self.recorder.event(reference(&*service), Kind::Warning, "SyncLoadBalancerFailed", message);
        } else {
            self.waiting.lock().remove(&key);
        }
        if has.iter().any(|one| !wanted.contains(one)) {
            self.wake_others(&key);
        }
        if shown == wanted {
            return Ok(Outcome::Done);
        }
        self.write(&key, &service, &wanted).await
    }

    async fn write(
        &self,
        key: &ObjectKey,
        service: &Service,
        wanted: &[IpAddr],
    ) -> Result<Outcome, SyncError> {
        let ingress: Vec<_> =
            wanted.iter().map(|address| json!({"ip": address.to_string(), "ipMode": "VIP"})).collect();
        let patch = json!({"metadata": {"resourceVersion": service.metadata.resource_version},
            "status": {"loadBalancer": {"ingress": ingress}}});
        let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
        match api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => {
                if !wanted.is_empty() {
                    let message = "Ensured load balancer".to_owned();
                    self.recorder.event(reference(service), Kind::Normal, "EnsuredLoadBalancer", message);
                }
                Ok(Outcome::Done)
            }
            Err(error) => match classify(&error) {
                // Its next state is on its way.
                Class::NotFound | Class::Conflict => Ok(Outcome::Again),
                Class::AlreadyExists
                | Class::Rejected
                | Class::NamespaceTerminating
                | Class::Expired
                | Class::Retry => Err(error).doing("write the load-balancer addresses of service", key),
            },
        }
    }

    fn release(&self, key: &ObjectKey) {
        self.waiting.lock().remove(key);
        let gone = self.holders.lock().remove(key);
        if gone.is_some_and(|(_, has)| !has.is_empty()) {
            self.wake_others(key);
        }
    }

    fn wake_others(&self, key: &ObjectKey) {
        self.waiting.lock().iter().filter(|one| *one != key).for_each(|one| self.queue.add(one.clone()));
    }
}

/// The addresses that a Service's status says.
fn addresses(service: &Service) -> Vec<IpAddr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref());
    ingress.into_iter().flatten().filter_map(|one| one.ip.as_deref()?.parse().ok()).collect()
}
