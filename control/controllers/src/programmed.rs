//! Owns the condition of each Service that says on how many nodes its addresses are programmed.
//!
//! Nodes don't write to Services: each keeps one line on its own Lease, and this controller turns changes of those into
//! conditions. A Service's status is written when what it says turns, not when nodes come and go.

mod book;
mod report;

use crate::error::{Doing, SyncError};
use crate::shared::Shared;
use book::{Book, Judgement, Verdict};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};
use parking_lot::Mutex;
use report::Report;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::Change;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{ObjectKey, found};

const WORKERS: usize = 4;
/// The condition's type.
const PROGRAMMED: &str = "weft.dev/Programmed";
const LEASES: &str = "kube-node-lease";
/// Labels on Services that another proxy, or none, serves.
const NOT_OURS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];

/// The controller.
pub(crate) struct Controller {
    client: Client,
    shared: Arc<Shared>,
    queue: Queue<ObjectKey>,
    book: Mutex<Book>,
}

impl Controller {
    /// Made before the caches are filled, so that it misses no change.
    pub(crate) fn new(client: Client, shared: Arc<Shared>) -> Arc<Self> {
        let controller = Arc::new(Self { client, shared, queue: Queue::default(), book: Mutex::default() });
        let weak = Arc::downgrade(&controller);
        controller.shared.services.on_change(move |change| {
            if let Some(controller) = weak.upgrade() {
                controller.on_service(change);
            }
        });
        let weak = Arc::downgrade(&controller);
        controller.shared.node_leases.on_change(move |change| {
            if let Some(controller) = weak.upgrade() {
                controller.on_lease(change);
            }
        });
        let weak = Arc::downgrade(&controller);
        controller.shared.nodes.on_change(move |change| {
            if let Some(controller) = weak.upgrade() {
                controller.on_node(change);
            }
        });
        controller
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.services.synced().await;
        self.shared.nodes.synced().await;
        self.shared.node_leases.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    fn on_service(&self, change: &Change<Service>) {
        let key = ObjectKey::of(&change.object().metadata);
        match change {
            Change::Deleted(_) => self.book.lock().gone(&key),
            Change::Applied { old: Some(old), new } if !matters(old, new) => return,
            Change::Applied { new, .. } if !is_programmed(new) => self.book.lock().gone(&key),
            Change::Applied { old, new } => {
                // Versions can be compared (KEP-5504); a server whose can't be read gets no conditions.
                let Some(version) = version(new) else { return };
                let inherited = old.is_none() && condition(new).is_some();
                self.book.lock().changed(&key, version, inherited, Instant::now());
            }
        }
        self.queue.add(key);
    }

    /// Most changes of a Lease are its renewal.
    fn on_lease(&self, change: &Change<Lease>) {
        let name = change.object().name_any();
        let same = match change {
            Change::Applied { old: Some(old), new } => annotation(old) == annotation(new),
            Change::Applied { old: None, .. } | Change::Deleted(_) => false,
        };
        if same {
            return;
        }
        let lease = match change {
            Change::Applied { new, .. } => Some(Arc::clone(new)),
            Change::Deleted(_) => None,
        };
        let node = self.shared.nodes.get("", &name);
        self.reports(&name, node.as_deref(), lease.as_deref());
    }

    fn on_node(&self, change: &Change<Node>) {
        let name = change.object().name_any();
        let (was, is) = match change {
            Change::Applied { old, new } => (old.as_deref().is_some_and(counts), counts(new)),
            Change::Deleted(_) => (true, false),
        };
        if was != is {
            let lease = self.shared.node_leases.get(LEASES, &name);
            let node = Some(&**change.object()).filter(|_| is);
            self.reports(&name, node, lease.as_deref());
        }
    }

    fn reports(&self, name: &str, node: Option<&Node>, lease: Option<&Lease>) {
        let report: Option<Report> = node.filter(|node| counts(node)).and(lease).and_then(report::read);
        let concerned = self.book.lock().report(name, report);
        concerned.into_iter().for_each(|key| self.queue.add(key));
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(service) = self.shared.services.by_key(&key) else { return Ok(Outcome::Done) };
        let current = condition(&service);
        if !is_programmed(&service) {
            if current.is_some() {
                self.write(&key, json!({"type": PROGRAMMED, "$patch": "delete"})).await?;
            }
            return Ok(Outcome::Done);
        }
        let verdict = match self.book.lock().judge(&key, Instant::now()) {
            Judgement::Nothing => return Ok(Outcome::Done),
            Judgement::Wait(wait) => return Ok(Outcome::After(wait)),
            Judgement::Say(verdict) => verdict,
        };
        if !says(current, &verdict) {
            self.write(&key, json!(new_condition(current, &verdict, Timestamp::now()))).await?;
        }
        Ok(Outcome::Done)
    }

    async fn write(&self, key: &ObjectKey, condition: Value) -> Result<(), SyncError> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
        let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
        let patched = api.patch_status(&key.name, &PatchParams::default(), &patch).await;
        found(patched).doing("write the condition of service", key)?;
        Ok(())
    }
}

/// Whether nodes have anything of it in their kernels.
fn is_programmed(service: &Service) -> bool {
    let Some(spec) = &service.spec else { return false };
    let has_address = spec.cluster_ip.as_deref().is_some_and(|ip| !ip.is_empty() && ip != "None");
    has_address
        && spec.type_.as_deref() != Some("ExternalName")
        && !NOT_OURS.iter().any(|label| service.labels().contains_key(*label))
}

/// Whether a change is one that nodes may have to program; a condition of its own is none.
fn matters(old: &Service, new: &Service) -> bool {
    let balancer =
        |service: &Service| service.status.as_ref().and_then(|status| status.load_balancer.clone());
    old.metadata.uid != new.metadata.uid
        || old.spec != new.spec
        || old.metadata.labels != new.metadata.labels
        || old.metadata.annotations != new.metadata.annotations
        || balancer(old) != balancer(new)
}

fn version(service: &Service) -> Option<u64> {
    service.metadata.resource_version.as_ref()?.parse().ok()
}

fn annotation(lease: &Lease) -> Option<&String> {
    lease.metadata.annotations.as_ref()?.get(report::ANNOTATION)
}

/// A node that is silent says nothing of Services any more.
fn counts(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    ready.any(|condition| condition.status != "Unknown")
}

fn condition(service: &Service) -> Option<&Condition> {
    let conditions = service.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == PROGRAMMED)
}

fn status(verdict: &Verdict) -> &'static str {
    if verdict.programmed { "True" } else { "False" }
}

/// Whether the condition says it already. Once a Service is on all nodes, others that come or go are no news of it.
fn says(current: Option<&Condition>, verdict: &Verdict) -> bool {
    let Some(current) = current else { return false };
    let at = |message: &str| message.rsplit(" at ").next().map(str::to_owned);
    let message = match (verdict.programmed, verdict.exact) {
        (true, false) => true,
        (true, true) => at(&current.message) == at(&verdict.message),
        (false, _) => current.message == verdict.message,
    };
    current.status == status(verdict) && current.reason == verdict.reason && message
}

fn new_condition(current: Option<&Condition>, verdict: &Verdict, now: Timestamp) -> Condition {
    let turned = current.filter(|current| current.status == status(verdict));
    Condition {
        type_: PROGRAMMED.to_owned(),
        status: status(verdict).to_owned(),
        reason: verdict.reason.to_owned(),
        message: verdict.message.clone(),
        last_transition_time: turned.map_or(Time(now), |current| current.last_transition_time.clone()),
        observed_generation: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(programmed: bool, message: &str, exact: bool) -> Verdict {
        let reason = if programmed { "Programmed" } else { "ProgrammingFailed" };
        Verdict { programmed, reason, message: message.to_owned(), exact }
    }

    #[test]
    fn a_condition_is_written_when_it_turns_and_not_when_nodes_come() {
        let three = verdict(true, "programmed on 3 of 3 nodes at resource version 7", true);
        let written = new_condition(None, &three, Timestamp::UNIX_EPOCH);
        assert!(!says(None, &three));
        assert!(says(Some(&written), &three));
        let four = "programmed on 4 of 4 nodes at resource version 7";
        assert!(says(Some(&written), &verdict(true, four, true)), "another node is no news of the Service");
        let later = "programmed on 3 of 3 nodes at resource version 8";
        assert!(!says(Some(&written), &verdict(true, later, true)));
        assert!(
            says(Some(&written), &verdict(true, later, false)),
            "found so: nobody knows which change it was"
        );
        let full = verdict(false, "programmed on 2 of 3 nodes at resource version 7; b: full", true);
        assert!(!says(Some(&written), &full));
        let failing = new_condition(Some(&written), &full, Timestamp::now());
        assert_ne!(failing.last_transition_time, written.last_transition_time);
        let less = verdict(false, "programmed on 1 of 3 nodes at resource version 7; a: full; b: full", true);
        assert!(!says(Some(&failing), &less), "who fails is told exactly");
        let still = new_condition(Some(&failing), &less, Timestamp::UNIX_EPOCH);
        assert_eq!(still.last_transition_time, failing.last_transition_time);
    }

    #[test]
    fn only_services_of_the_kernel_have_one_and_its_own_change_does_not_matter() {
        let service = |value: Value| serde_json::from_value::<Service>(value).unwrap();
        let web = service(json!({"metadata": {}, "spec": {"clusterIP": "10.43.0.9"}}));
        assert!(is_programmed(&web));
        for other in [
            json!({"metadata": {}, "spec": {"clusterIP": "None"}}),
            json!({"metadata": {}, "spec": {"type": "ExternalName"}}),
            json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}, "spec": {"clusterIP": "10.43.0.9"}}),
        ] {
            assert!(!is_programmed(&service(other)));
        }
        let mut told = web.clone();
        told.status = Some(Default::default());
        assert!(!matters(&web, &told));
        told.metadata.annotations = Some([("weft.dev/port-ranges".to_owned(), "1-2".to_owned())].into());
        assert!(matters(&web, &told));
    }
}
