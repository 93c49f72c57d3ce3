//! Owns the repair of allocations: every cluster IP of a Service has its IPAddress, and no IPAddress of the allocator is
//! without its Service. What goes wrong is somebody else's doing, such as an IPAddress deleted by hand or a store
//! that another server wrote before.
//!
//! After one look at everything, only what changes is looked at.

use super::addresses::{self, FAMILY, GROUP, MANAGED_BY, MANAGER};
use super::ports;
use crate::api::{Api, object_key, store_failure};
use crate::cache::{Item, Resume, object_value_bytes};
use crate::registry::{NewObject, create};
use crate::resources::Resource;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use weft_control_api::kinds;
use weft_control_api::status::Status;
use weft_control_store::{Condition, Op, Range, Revision};

/// Pause before the next try after the store failed.
const RETRY: Duration = Duration::from_secs(1);
/// Who reports what was found.
const COMPONENT: &str = "ipallocator-repair-controller";

struct Repair<'a> {
    api: &'a Arc<Api>,
    services: Arc<Resource>,
    addresses: Arc<Resource>,
}

/// Repairs until the server stops.
pub(crate) async fn run(api: &Arc<Api>) {
    let services = api.resources.by_plural("", "services").cloned();
    let addresses = api.resources.by_plural(GROUP, "ipaddresses").cloned();
    let (Some(services), Some(addresses)) = (services, addresses) else { return };
    let repair = Repair { api, services, addresses };
    let mut changed = [api.cache.subscribe(repair.services.id), api.cache.subscribe(repair.addresses.id)];
    let mut position = None;
    loop {
        for one in &mut changed {
            one.mark_unchanged();
        }
        match repair.pass(position).await {
            Ok(reached) => position = Some(reached),
            Err(status) => {
                tracing::warn!(error = %status, "allocations couldn't be repaired; it is tried again");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        }
        let [services, addresses] = &mut changed;
        let ended = tokio::select! {
            ended = services.changed() => ended,
            ended = addresses.changed() => ended,
        };
        if ended.is_err() {
            return;
        }
    }
}

impl Repair<'_> {
    /// Looks at what changed since a revision, or at everything; the revision reached.
    async fn pass(&self, since: Option<u64>) -> Result<u64, Status> {
        let Some(since) = since else { return self.everything().await };
        let cache = &self.api.cache;
        let resumed =
            (cache.changes_after(self.services.id, since), cache.changes_after(self.addresses.id, since));
        let (Resume::Changes(services, one), Resume::Changes(addresses, other)) = resumed else {
            return self.everything().await;
        };
        for change in services.iter().filter(|change| !change.deleted) {
            self.service(&change.item.key).await?;
        }
        for change in &addresses {
            if change.deleted {
                let parent = change.item.parse()["spec"]["parentRef"].clone();
                let part = |key: &str| parent[key].as_str().unwrap_or_default().to_owned();
                self.service(&object_key(&part("namespace"), &part("name"))).await?;
            } else {
                self.address(&change.item.key).await?;
            }
        }
        Ok(one.min(other))
    }

    async fn everything(&self) -> Result<u64, Status> {
        let revision = self.api.cache.revision();
        for key in self.api.cache.snapshot(self.services.id).objects.keys() {
            self.service(key).await?;
        }
        for key in self.api.cache.snapshot(self.addresses.id).objects.keys() {
            self.address(key).await?;
        }
        self.ports().await?;
        Ok(revision)
    }

    /// Sees to it that a Service's addresses are allocated to it.
    async fn service(&self, key: &str) -> Result<(), Status> {
        let Some(item) = self.api.cache.get(self.services.id, key) else { return Ok(()) };
        let service = item.parse();
        for address in addresses::of(&service["spec"]) {
            self.pair(&item, &service, &address).await?;
        }
        Ok(())
    }

    async fn pair(&self, item: &Item, service: &Value, address: &str) -> Result<(), Status> {
        let family = addresses::family(address);
        if !addresses::in_some_range(self.api, address) {
            let message = format!(
                "Cluster IP [{family}]: {address} is not within any configured Service CIDR; please recreate service"
            );
            return self.report(service, "ClusterIPOutOfRange", &message).await;
        }
        let Some(present) = addresses::taken(self.api, address) else {
            let message = format!("Cluster IP [{family}]: {address} is not allocated; repairing");
            return self.write(item, service, address, None, &message).await;
        };
        let object = present.parse();
        let labels = &object["metadata"]["labels"];
        if addresses::is_parent(&object, service) {
            if labels[FAMILY] == family && labels[MANAGED_BY] == MANAGER {
                return Ok(());
            }
        } else if self.is_used(&object, address) {
            let message = format!(
                "Cluster IP [{family}]:{address} was assigned to multiple services; please recreate service"
            );
            return self.report(service, "ClusterIPAlreadyAllocated", &message).await;
        }
        let (namespace, name) = (&service["metadata"]["namespace"], &service["metadata"]["name"]);
        let message = format!(
            "the ClusterIP [{family}]: {address} for Service {}/{} has a wrong reference; repairing",
            namespace.as_str().unwrap_or_default(),
            name.as_str().unwrap_or_default()
        );
        self.write(item, service, address, Some(&present), &message).await
    }

    /// Whether the Service that an IPAddress names has that address.
    fn is_used(&self, object: &Value, address: &str) -> bool {
        let parent = &object["spec"]["parentRef"];
        let part = |key: &str| parent[key].as_str().unwrap_or_default();
        if !part("group").is_empty() || part("resource") != "services" {
            return false;
        }
        let service = self.api.cache.get(self.services.id, &object_key(part("namespace"), part("name")));
        service.is_some_and(|service| addresses::of(&service.parse()["spec"]).contains(address))
    }

    /// Writes an IPAddress anew, if neither it nor the Service has changed; a change brings both back here.
    async fn write(
        &self,
        item: &Item,
        service: &Value,
        address: &str,
        present: Option<&Item>,
        message: &str,
    ) -> Result<(), Status> {
        let key = self.addresses.store_key(address);
        let conditions = vec![
            Condition::ModRevision(self.services.store_key(&item.key), Revision(item.revision)),
            match present {
                Some(present) => Condition::ModRevision(key.clone(), Revision(present.revision)),
                None => Condition::Absent(key.clone()),
            },
        ];
        let value = object_value_bytes(&addresses::object(address, &service["metadata"]));
        let outcome = self.api.store.txn(conditions, vec![Op::Put { key, value }]).await;
        if matches!(outcome.map_err(store_failure)?, weft_control_store::TxnOutcome::Conflict(_)) {
            return Ok(());
        }
        tracing::warn!(service = %item.key, address, "{message}");
        self.report(service, "ClusterIPNotAllocated", message).await
    }

    /// Removes an IPAddress of the allocator that no Service has.
    async fn address(&self, name: &str) -> Result<(), Status> {
        let Some(item) = self.api.cache.get(self.addresses.id, name) else { return Ok(()) };
        let object = item.parse();
        let ours = object["metadata"]["labels"][MANAGED_BY] == MANAGER;
        if !ours || self.is_used(&object, name) || !object["metadata"]["deletionTimestamp"].is_null() {
            return Ok(());
        }
        let key = self.addresses.store_key(name);
        let conditions = vec![Condition::ModRevision(key.clone(), Revision(item.revision))];
        self.api.store.txn(conditions, vec![Op::Delete { key }]).await.map_err(store_failure)?;
        tracing::warn!(address = name, "an IPAddress of no Service was removed");
        Ok(())
    }

    /// Sees to it that the node ports of all Services, and no others, are taken.
    async fn ports(&self) -> Result<(), Status> {
        let range = Range::prefix(ports::NODE_PORTS);
        let page = self.api.store.range(range, Revision(0), 0).await.map_err(store_failure)?;
        let mut left: std::collections::BTreeMap<String, Revision> =
            page.items.into_iter().map(|kv| (kv.key, kv.mod_revision)).collect();
        for item in self.api.cache.snapshot(self.services.id).objects.values() {
            let service = item.parse();
            for port in ports::of(&service["spec"]) {
                let key = format!("{}{port}", ports::NODE_PORTS);
                if left.remove(&key).is_some() {
                    continue;
                }
                let conditions = vec![
                    Condition::Absent(key.clone()),
                    Condition::ModRevision(self.services.store_key(&item.key), Revision(item.revision)),
                ];
                let op = Op::Put { key, value: ports::owner(&service) };
                self.api.store.txn(conditions, vec![op]).await.map_err(store_failure)?;
            }
        }
        for (key, revision) in left {
            // Whoever took it since the look has written it since.
            let conditions = vec![Condition::ModRevision(key.clone(), revision)];
            tracing::warn!(key, "a node port of no Service was given back");
            self.api.store.txn(conditions, vec![Op::Delete { key }]).await.map_err(store_failure)?;
        }
        Ok(())
    }

    /// Tells the Service's users.
    async fn report(&self, service: &Value, reason: &str, message: &str) -> Result<(), Status> {
        let Some(kind) = kinds::find("", "v1", "events") else { return Ok(()) };
        let metadata = &service["metadata"];
        let namespace = metadata["namespace"].as_str().unwrap_or_default();
        let now = crate::registry::now();
        let event = json!({"apiVersion": "v1", "kind": "Event",
            "metadata": {"name": format!("{}.{:x}", metadata["name"].as_str().unwrap_or_default(),
                rand::random::<u64>())},
            "involvedObject": {"apiVersion": "v1", "kind": "Service", "namespace": namespace,
                "name": metadata["name"], "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]},
            "type": "Warning", "reason": reason, "message": message, "count": 1,
            "firstTimestamp": now, "lastTimestamp": now,
            "reportingComponent": COMPONENT, "source": {"component": COMPONENT}});
        let user = crate::identity::User::new("system:apiserver", &[crate::identity::MASTERS]);
        let new = NewObject { kind, namespace, object: event, dry_run: false };
        match create(self.api, &user, new).await {
            Ok(_) => Ok(()),
            // A namespace on its way out takes no Events, and needs none.
            Err(status) if matches!(status.code(), 403 | 404) => Ok(()),
            Err(status) => Err(status),
        }
    }
}
