//! Owns the end of a namespace: deletes all that is in it, waits for finalizers, then lets it go.

use crate::discovery::{self, Resource};
use crate::error::{Doing, SyncError, message};
use crate::shared::Shared;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::core::DynamicObject;
use kube::{Client, ResourceExt};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use weft_control_client::queue::{Outcome, Queue, work};
use weft_control_client::{Class, ObjectKey, classify, found};

/// Upstream's `--concurrent-namespace-syncs`.
const WORKERS: usize = 10;
/// The finalizer that this controller takes away.
const FINALIZER: &str = "kubernetes";
const RECHECK_MIN: Duration = Duration::from_millis(100);
const RECHECK_MAX: Duration = Duration::from_secs(5);

/// What is left in a namespace after everything was asked to go.
#[derive(Debug, Default)]
struct Remains {
    /// Objects per resource.
    objects: BTreeMap<String, usize>,
    /// Objects per finalizer.
    finalizers: BTreeMap<String, usize>,
    discovery_error: Option<String>,
    errors: Vec<String>,
}

impl Remains {
    fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.discovery_error.is_none() && self.errors.is_empty()
    }
}

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
        let to = queue.clone();
        shared.namespaces.on_change(move |change| {
            if change.object().metadata.deletion_timestamp.is_some() {
                to.add(ObjectKey::of(&change.object().metadata));
            }
        });
        Self { client, shared, queue }
    }

    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        self.shared.namespaces.synced().await;
        work(&self.queue, WORKERS, shutdown, |key| self.sync(key)).await;
    }

    async fn sync(&self, key: ObjectKey) -> Result<Outcome, SyncError> {
        let Some(namespace) = self.shared.namespaces.by_key(&key) else { return Ok(Outcome::Done) };
        let Some(deleted) = namespace.metadata.deletion_timestamp.as_ref() else { return Ok(Outcome::Done) };
        let finalizers = namespace.spec.as_ref().and_then(|s| s.finalizers.clone()).unwrap_or_default();
        if !finalizers.iter().any(|f| f == FINALIZER) {
            return Ok(Outcome::Done);
        }
        let remains = self.empty(&key.name).await;
        let api: Api<Namespace> = Api::all(self.client.clone());
        let mut updated = (*namespace).clone();
        let status = updated.status.get_or_insert_default();
        let before = status.clone();
        status.phase = Some("Terminating".into());
        status.conditions = Some(conditions(before.conditions.as_deref(), &remains, Timestamp::now()));
        if *status != before {
            match found(api.replace_status(&key.name, &PostParams::default(), &updated).await) {
                Ok(Some(stored)) => updated = stored,
                Ok(None) => return Ok(Outcome::Done),
                Err(error) if classify(&error) == Class::Conflict => return Ok(Outcome::Again),
                Err(error) => return Err(error).doing("update the status of namespace", &key),
            }
        }
        if !remains.is_empty() {
            for error in remains.errors.iter().chain(&remains.discovery_error) {
                tracing::warn!(namespace = %key, error, "cannot empty the namespace yet");
            }
            // Most content is gone at once; what takes its time is asked for ever more rarely.
            let age = Duration::try_from(Timestamp::now().duration_since(deleted.0)).unwrap_or_default();
            return Ok(Outcome::After((age / 4).clamp(RECHECK_MIN, RECHECK_MAX)));
        }
        if let Some(spec) = &mut updated.spec {
            spec.finalizers = Some(finalizers.into_iter().filter(|f| f != FINALIZER).collect());
        }
        match found(api.replace_subresource("finalize", &key.name, &PostParams::default(), &updated).await) {
            Ok(_) => Ok(Outcome::Done),
            Err(error) if classify(&error) == Class::Conflict => Ok(Outcome::Again),
            Err(error) => Err(error).doing("finalize namespace", &key),
        }
    }

    /// Asks everything in a namespace to go: pods first, so that what guards or serves them outlives them (KEP-5080).
    async fn empty(&self, namespace: &str) -> Remains {
        let mut remains = Remains::default();
        let resources = match discovery::deletable(&self.client).await {
            Ok(resources) => resources,
            Err(error) => {
                remains.discovery_error = Some(message(&error));
                return remains;
            }
        };
        let is_pods = |r: &&Resource| r.api.group.is_empty() && r.api.plural == "pods";
        let namespaced = || resources.iter().filter(|r| r.namespaced);
        for resource in namespaced().filter(is_pods) {
            self.clear(namespace, resource, &mut remains).await;
        }
        if remains.is_empty() {
            for resource in namespaced().filter(|r| !is_pods(r)) {
                self.clear(namespace, resource, &mut remains).await;
            }
        }
        remains
    }

    async fn clear(&self, namespace: &str, resource: &Resource, remains: &mut Remains) {
        if let Err(error) = self.try_clear(namespace, resource, remains).await
            && classify(&error) != Class::NotFound
        {
            remains.errors.push(format!("{}: {}", resource.name(), message(&error)));
        }
    }

    async fn try_clear(
        &self,
        namespace: &str,
        resource: &Resource,
        remains: &mut Remains,
    ) -> kube::Result<()> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource.api);
        if api.list_metadata(&ListParams::default().limit(1)).await?.items.is_empty() {
            return Ok(());
        }
        let params = DeleteParams::background();
        if resource.supports("deletecollection") {
            api.delete_collection(&params, &ListParams::default()).await?;
        } else {
            for object in api.list_metadata(&ListParams::default()).await? {
                found(api.delete(&object.name_any(), &params).await.map(|_| ()))?;
            }
        }
        let left = api.list_metadata(&ListParams::default()).await?.items;
        if left.is_empty() {
            return Ok(());
        }
        remains.objects.insert(resource.name(), left.len());
        for finalizer in left.iter().flat_map(|o| o.metadata.finalizers.iter().flatten()) {
            *remains.finalizers.entry(finalizer.clone()).or_default() += 1;
        }
        Ok(())
    }
}

/// Upstream's conditions of a terminating namespace; the transition time changes with the status only.
fn conditions(
    old: Option<&[NamespaceCondition]>,
    remains: &Remains,
    now: Timestamp,
) -> Vec<NamespaceCondition> {
    let or = |bad: bool, yes: (&'static str, String), no: (&'static str, &str)| match bad {
        true => ("True", yes.0, yes.1),
        false => ("False", no.0, no.1.to_owned()),
    };
    let counted = |counts: &BTreeMap<String, usize>, middle: &str| {
        let parts: Vec<_> =
            counts.iter().map(|(name, n)| format!("{name}{middle}{n} resource instances")).collect();
        parts.join(", ")
    };
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            or(
                remains.discovery_error.is_some(),
                ("DiscoveryFailed", remains.discovery_error.clone().unwrap_or_default()),
                ("ResourcesDiscovered", "All resources successfully discovered"),
            ),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            ("False", "ParsedGroupVersions", "All legacy kube types successfully parsed".to_owned()),
        ),
        (
            "NamespaceDeletionContentFailure",
            or(
                !remains.errors.is_empty(),
                ("ContentDeletionFailed", remains.errors.join(", ")),
                ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
            ),
        ),
        (
            "NamespaceContentRemaining",
            or(
                !remains.objects.is_empty(),
                (
                    "SomeResourcesRemain",
                    format!("Some resources are remaining: {}", counted(&remains.objects, ". has ")),
                ),
                ("ContentRemoved", "All content successfully removed"),
            ),
        ),
        (
            "NamespaceFinalizersRemaining",
            or(
                !remains.finalizers.is_empty(),
                (
                    "SomeFinalizersRemain",
                    format!(
                        "Some content in the namespace has finalizers remaining: {}",
                        counted(&remains.finalizers, " in ")
                    ),
                ),
                ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
            ),
        ),
    ];
    let condition = |(kind, (status, reason, message)): (&str, (&str, &str, String))| {
        let before = old.into_iter().flatten().find(|c| c.type_ == kind && c.status == status);
        let since = before.and_then(|c| c.last_transition_time.clone());
        NamespaceCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_transition_time: since.or(Some(Time(now))),
        }
    };
    rows.into_iter().map(condition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn conditions_say_what_remains() {
        let remains = Remains {
            objects: [("pods".to_owned(), 2)].into(),
            finalizers: [("example.com/wait".to_owned(), 1)].into(),
            ..Remains::default()
        };
        let all = conditions(None, &remains, at(1));
        let message = |kind: &str| {
            let c = all.iter().find(|c| c.type_ == kind).unwrap();
            (c.status.clone(), c.message.clone().unwrap())
        };
        let remaining = "Some resources are remaining: pods. has 2 resource instances";
        assert_eq!(message("NamespaceContentRemaining"), ("True".into(), remaining.into()));
        let finalizers = "Some content in the namespace has finalizers remaining: example.com/wait in 1 resource instances";
        assert_eq!(message("NamespaceFinalizersRemaining"), ("True".into(), finalizers.into()));
        assert_eq!(message("NamespaceDeletionContentFailure").0, "False");
        assert!(!remains.is_empty());
    }

    #[test]
    fn an_unchanged_condition_keeps_its_time() {
        let first = conditions(None, &Remains::default(), at(1));
        assert_eq!(conditions(Some(&first), &Remains::default(), at(2)), first);
    }
}
