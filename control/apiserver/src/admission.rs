//! Owns admission: what may be changed about, or refused of, an otherwise good request.

mod ingress;
mod node;
mod pod;
mod rbac;

use crate::api::Api;
use crate::identity::User;
use serde_json::Value;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use weft_control_api::kinds::Kind;
use weft_control_api::status::{Cause, Status};
use weft_control_store::{Condition, Revision};

/// What is done to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// It is created.
    Create,
    /// It is changed.
    Update,
    /// It is deleted.
    Delete,
}

/// A request under review.
pub(crate) struct Review<'a> {
    /// What all requests share.
    pub(crate) api: &'a Arc<Api>,
    /// Who asks.
    pub(crate) user: &'a User,
    /// What is done.
    pub(crate) operation: Operation,
    /// The stored kind.
    pub(crate) kind: &'static Kind,
    /// The subresource; empty for the object itself.
    pub(crate) subresource: &'a str,
    /// The namespace; empty at cluster scope.
    pub(crate) namespace: &'a str,
    /// The name.
    pub(crate) name: &'a str,
}

impl Review<'_> {
    fn is(&self, group: &str, kind: &str) -> bool {
        self.kind.group == group && self.kind.kind == kind
    }

    fn forbidden(&self, reason: &str) -> Status {
        Status::forbidden(self.kind.group_resource(), self.name, reason)
    }
}

/// Namespaces that are never deleted.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

/// How long a pod waits for the account `default` of a new namespace.
const ACCOUNT_WAIT: Duration = Duration::from_millis(1500);

/// Waits for what a controller is about to make: the account `default` of a new namespace, which a pod created
/// right after the namespace needs.
pub(crate) async fn await_account(api: &Api, kind: &Kind, namespace: &str, object: &Value) {
    let named = object["spec"]["serviceAccountName"].as_str().unwrap_or("default");
    if kind.kind != "Pod" || !kind.group.is_empty() || !matches!(named, "" | "default") {
        return;
    }
    let Some(accounts) = api.resources.by_plural("", "serviceaccounts") else { return };
    let mut changed = api.cache.subscribe(accounts.id);
    let wait = async {
        while api.cached("", "serviceaccounts", namespace, "default").is_none() {
            if changed.changed().await.is_err() {
                break;
            }
        }
    };
    // If it doesn't come, the review of the pod says so.
    let _ = tokio::time::timeout(ACCOUNT_WAIT, wait).await;
}

/// Changes what admission decides, before validation.
pub(crate) fn mutate(review: &Review<'_>, object: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    if review.is("", "Pod") && review.subresource.is_empty() {
        pod::mutate(review, object, old)?;
    }
    if review.is("networking.k8s.io", "Ingress") && review.operation == Operation::Create {
        ingress::default_class(review, object);
    }
    if review.is("", "Node") && review.operation == Operation::Create {
        node::taint_new(object);
    }
    Ok(())
}

/// Refuses what may not be, after validation. `object` is none for a deletion.
pub(crate) fn validate(
    review: &Review<'_>,
    object: Option<&Value>,
    old: Option<&Value>,
) -> Result<(), Status> {
    if review.operation == Operation::Delete && review.is("", "Namespace") && IMMORTAL.contains(&review.name)
    {
        return Err(review.forbidden("this namespace may not be deleted"));
    }
    node::restrict(review, object, old)?;
    rbac::escalation(review, object, old)
}

/// Checks that new objects may be put into the namespace; what must still hold when the object is written.
pub(crate) async fn namespace_open(
    api: &Api,
    kind: &Kind,
    namespace: &str,
    name: &str,
) -> Result<Vec<Condition>, Status> {
    if !kind.namespaced || namespace.is_empty() {
        return Ok(Vec::new());
    }
    let Some(namespaces) = api.resources.by_plural("", "namespaces").cloned() else { return Ok(Vec::new()) };
    let item = match api.cache.get(namespaces.id, namespace) {
        Some(item) => Some(item),
        None => api.fresh(&namespaces, namespace).await?,
    };
    let item = item.ok_or_else(|| Status::not_found(namespaces.storage.group_resource(), namespace))?;
    if item.field("status.phase") == Some("Terminating") {
        let reason =
            format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut status = Status::forbidden(kind.group_resource(), name, &reason);
        if let Some(details) = status.details.as_mut() {
            details.causes.push(Cause {
                reason: Cow::Borrowed("NamespaceTerminating"),
                message: format!("namespace {namespace} is being terminated"),
                field: "metadata.namespace".to_owned(),
            });
        }
        return Err(status);
    }
    // A namespace that begins to end while this is on its way is seen by the transaction.
    Ok(vec![Condition::ModRevision(namespaces.store_key(namespace), Revision(item.revision))])
}
