//! Owns ServiceCIDRs: each is ready, and stays as long as an address needs it.

use crate::error::{Doing, SyncError};
use crate::shared::Shared;
use ipnetwork::IpNetwork;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use std::net::IpAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{Class, ObjectKey, classify};

const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const MANAGED_BY: &str = "ipaddress.kubernetes.io/managed-by";
const ALLOCATOR: &str = "ipallocator.k8s.io";
const BLOCKED: &str =
    "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
const READY: &str = "Kubernetes Service CIDR is ready";

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Self {
        let queue = Queue::default();
        let (to, weak) = (queue.clone(), Arc::downgrade(&shared));
        shared.service_cidrs.on_change(move |change| {
            to.add(ObjectKey::of(&change.object().metadata));
            // A range that comes may take over what another one is kept for.
            let Some(shared) = weak.upgrade() else { return };
            let all = shared.service_cidrs.list();
            all.iter().filter(|one| is_going(one)).for_each(|one| to.add(ObjectKey::of(&one.metadata)));
        });
        let (to, weak) = (queue.clone(), Arc::downgrade(&shared));
        shared.ip_addresses.on_change(move |change| {
            let (Change::Deleted(address), Some(shared)) = (change, weak.upgrade()) else { return };
            let all = shared.service_cidrs.list();
            let waiting =
                all.iter().filter(|one| is_going(one) && ip(address).is_some_and(|ip| holds(one, ip)));
            waiting.for_each(|one| to.add(ObjectKey::of(&one.metadata)));
        });
        Self { client, shared, queue }
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.service_cidrs.synced().await;
        self.shared.ip_addresses.synced().await;
        work(&self.queue, 1, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(range) = self.shared.service_cidrs.by_key(&key) else { return Ok(Outcome::Done) };
        let has_finalizer = range.metadata.finalizers.iter().flatten().any(|one| one == FINALIZER);
        if !is_going(&range) {
            if !has_finalizer {
                return self.set_finalizers(&range, |all| all.push(FINALIZER.to_owned())).await;
            }
            return self.set_ready(&range, "True", "", READY).await;
        }
        if is_needed(&range, &self.shared.service_cidrs.list(), &self.shared.ip_addresses.list()) {
            return self.set_ready(&range, "False", "Terminating", BLOCKED).await;
        }
        if has_finalizer {
            return self.set_finalizers(&range, |all| all.retain(|one| one != FINALIZER)).await;
        }
        Ok(Outcome::Done)
    }

    fn api(&self) -> Api<ServiceCIDR> {
        Api::all(self.client.clone())
    }

    async fn set_finalizers(
        &self,
        range: &ServiceCIDR,
        change: impl FnOnce(&mut Vec<String>),
    ) -> Result<Outcome, SyncError> {
        let mut finalizers = range.metadata.finalizers.clone().unwrap_or_default();
        change(&mut finalizers);
        // The list is replaced whole, so it must be the one that was seen.
        let patch = json!({"metadata": {
            "resourceVersion": range.metadata.resource_version, "finalizers": finalizers}});
        let name = range.metadata.name.as_deref().unwrap_or_default();
        let written = self.api().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        settled(written, "protect ServiceCIDR", name)
    }

    async fn set_ready(
        &self,
        range: &ServiceCIDR,
        status: &str,
        reason: &str,
        message: &str,
    ) -> Result<Outcome, SyncError> {
        let conditions = range.status.as_ref().and_then(|status| status.conditions.as_ref());
        let ready = conditions.into_iter().flatten().find(|one| one.type_ == "Ready");
        if ready.is_some_and(|one| (one.status.as_str(), one.message.as_str()) == (status, message)) {
            return Ok(Outcome::Done);
        }
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let patch = json!({"status": {"conditions": [{"type": "Ready", "status": status, "reason": reason,
            "message": message, "lastTransitionTime": now}]}});
        let name = range.metadata.name.as_deref().unwrap_or_default();
        // Strategic: conditions of others stay.
        let written = self.api().patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await;
        settled(written, "write the status of ServiceCIDR", name)
    }
}

/// A lost race and an object that is gone are seen by the next event.
fn settled<T>(written: kube::Result<T>, doing: &'static str, name: &str) -> Result<Outcome, SyncError> {
    match written {
        Ok(_) => Ok(Outcome::Done),
        Err(error) => match classify(&error) {
            Class::NotFound | Class::Conflict => Ok(Outcome::Again),
            Class::AlreadyExists
            | Class::Rejected
            | Class::NamespaceTerminating
            | Class::Expired
            | Class::Retry => Err(error).doing(doing, name),
        },
    }
}

fn is_going(range: &ServiceCIDR) -> bool {
    range.metadata.deletion_timestamp.is_some()
}

fn ip(address: &IPAddress) -> Option<IpAddr> {
    address.metadata.name.as_deref()?.parse().ok()
}

fn holds(range: &ServiceCIDR, address: IpAddr) -> bool {
    let cidrs = range.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    cidrs.filter_map(|cidr| cidr.parse::<IpNetwork>().ok()).any(|network| network.contains(address))
}

/// Whether some Service's address is in no range that stays but this one.
fn is_needed(range: &ServiceCIDR, all: &[Arc<ServiceCIDR>], addresses: &[Arc<IPAddress>]) -> bool {
    let others: Vec<_> =
        all.iter().filter(|one| one.metadata.uid != range.metadata.uid && !is_going(one)).collect();
    let managed = |address: &&Arc<IPAddress>| {
        let labels = address.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|by| by == ALLOCATOR)
    };
    let mut mine = addresses.iter().filter(managed).filter_map(|one| ip(one)).filter(|ip| holds(range, *ip));
    mine.any(|ip| !others.iter().any(|one| holds(one, ip)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(name: &str, cidrs: &[&str], going: bool) -> Arc<ServiceCIDR> {
        let mut object = json!({"metadata": {"name": name, "uid": name}, "spec": {"cidrs": cidrs}});
        if going {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn address(name: &str, by: &str) -> Arc<IPAddress> {
        let object = json!({"metadata": {"name": name, "labels": {MANAGED_BY: by}},
            "spec": {"parentRef": {"resource": "services", "name": "a"}}});
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_range_is_needed_for_addresses_that_no_other_has() {
        let going = range("a", &["10.0.0.0/24", "fd00::/112"], true);
        let addresses = [address("10.0.0.5", ALLOCATOR), address("10.0.1.5", ALLOCATOR)];
        assert!(is_needed(&going, std::slice::from_ref(&going), &addresses));
        let wide = range("b", &["10.0.0.0/16"], false);
        assert!(!is_needed(&going, &[going.clone(), wide], &addresses));
        let wide = range("b", &["10.0.0.0/16"], true);
        assert!(is_needed(&going, &[going.clone(), wide], &addresses), "it goes as well");
        assert!(!is_needed(&going, std::slice::from_ref(&going), &[address("10.0.0.5", "somebody")]));
        assert!(is_needed(&going, std::slice::from_ref(&going), &[address("fd00::9", ALLOCATOR)]));
        assert!(!is_needed(&going, std::slice::from_ref(&going), &[]));
    }
}
