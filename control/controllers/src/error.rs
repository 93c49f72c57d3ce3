//! Owns the errors of controllers.

use std::fmt::Display;

/// Why controllers can't run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration can't work.
    #[error("the controllers' configuration is wrong: {0}")]
    Config(String),
}

/// An API call that failed while an object was synced; it is retried with back-off.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {object}")]
pub(crate) struct SyncError {
    doing: &'static str,
    object: String,
    #[source]
    source: kube::Error,
}

/// Says what was being done when a call failed.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str, object: impl Display) -> Result<T, SyncError>;
}

impl<T> Doing<T> for Result<T, kube::Error> {
    fn doing(self, doing: &'static str, object: impl Display) -> Result<T, SyncError> {
        self.map_err(|source| SyncError { doing, object: object.to_string(), source })
    }
}

impl SyncError {
    /// What the API server said, for an Event or a condition.
    pub(crate) fn api_message(&self) -> String {
        message(&self.source)
    }
}

/// The API server's own words, without the client's.
pub(crate) fn message(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error { status.message.clone() } else { error.to_string() }
}
