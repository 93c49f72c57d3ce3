//! Owns admission: what may be changed about, or refused of, an otherwise good request.

mod node;
mod pod;
mod rbac;

use crate::api::Api;
use crate::identity::User;
use serde_json::Value;
use std::borrow::Cow;
use std::sync::Arc;
use weft_control_api::kinds::Kind;
use weft_control_api::status::{Cause, Status};
use weft_control_store::{Condition, Revision};

/// What is done to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It is created.
    Create,
    /// It is changed.
    Update,
    /// It is deleted.
    Delete,
}

/// A request under review.
pub struct Review<'a> {
    /// What all requests share.
    pub api: &'a Arc<Api>,
    /// Who asks.
    pub user: &'a User,
    /// What is done.
    pub operation: Operation,
    /// The stored kind.
    pub kind: &'static Kind,
    /// The subresource; empty for the object itself.
    pub subresource: &'a str,
    /// The namespace; empty at cluster scope.
    pub namespace: &'a str,
    /// The name.
    pub name: &'a str,
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

/// Changes what admission decides, before validation.
pub fn mutate(review: &Review<'_>, object: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    if review.is("", "Pod") && review.subresource.is_empty() {
        pod::mutate(review, object, old)?;
    }
    if review.is("", "Node") && review.operation == Operation::Create {
        node::taint_new(object);
    }
    Ok(())
}

/// Refuses what may not be, after validation. `object` is none for a deletion.
pub fn validate(review: &Review<'_>, object: Option<&Value>, old: Option<&Value>) -> Result<(), Status> {
    if review.operation == Operation::Delete && review.is("", "Namespace") && IMMORTAL.contains(&review.name) {
        return Err(review.forbidden("this namespace may not be deleted"));
    }
    node::restrict(review, object, old)?;
    rbac::escalation(review, object, old)
}

/// Checks that new objects may be put into the namespace; what must still hold when the object is written.
pub async fn namespace_open(
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
        let reason = format!(
            "unable to create new content in namespace {namespace} because it is being terminated"
        );
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
