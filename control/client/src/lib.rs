//! Owns what every client-side loop of the control plane needs over `kube::Client`: informers, a rate-limited
//! work queue, expectations, leader election, and the Event recorder. Knows nothing of what a controller decides.
#![forbid(unsafe_code)]

pub mod expectations;
pub mod informer;
pub mod leader;
pub mod queue;
pub mod recorder;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use std::fmt;

/// Namespace and name of an object; the namespace of a cluster-scoped object is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Namespace, or empty.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
}

impl ObjectKey {
    /// The key for a namespace (empty for cluster scope) and a name.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The key of the object that carries this metadata.
    pub fn of(meta: &ObjectMeta) -> Self {
        Self::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// The owner reference that says `controller: true`, if any.
pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.as_deref().unwrap_or_default().iter().find(|r| r.controller == Some(true))
}

/// What to do about a failed API call, decided once for every loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The object (or its namespace) is gone.
    NotFound,
    /// Somebody else wrote first: read again.
    Conflict,
    /// It is there already.
    AlreadyExists,
    /// The request will never be accepted as it is.
    Rejected,
    /// The namespace is being deleted: nothing can be created in it.
    NamespaceTerminating,
    /// The resource version is too old.
    Expired,
    /// Try again later.
    Retry,
}

/// Classifies an API error.
pub fn classify(error: &kube::Error) -> Class {
    let kube::Error::Api(status) = error else { return Class::Retry };
    let terminating =
        status.details.as_ref().is_some_and(|d| d.causes.iter().any(|c| c.reason == "NamespaceTerminating"));
    match (status.reason.as_str(), status.code) {
        _ if terminating => Class::NamespaceTerminating,
        ("AlreadyExists", _) => Class::AlreadyExists,
        ("NotFound", _) | (_, 404) => Class::NotFound,
        ("Conflict", _) | (_, 409) => Class::Conflict,
        ("Expired" | "Gone", _) | (_, 410) => Class::Expired,
        (_, 429) => Class::Retry,
        (_, 400..=499) => Class::Rejected,
        _ => Class::Retry,
    }
}

/// `Ok(None)` in place of a NotFound error.
pub fn found<T>(result: Result<T, kube::Error>) -> Result<Option<T>, kube::Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if classify(&error) == Class::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Prints an error and what caused it, on one line.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
