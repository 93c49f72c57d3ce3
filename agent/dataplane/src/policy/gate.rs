//! The gate of a pod: nothing in it runs before its policies are in the kernel.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

/// Pods that may wait at a time; more wait for a place.
const WAITING: usize = 256;

/// Why a pod may not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// There is nobody to ask (any more).
    #[error("the data plane does not run")]
    Closed,
}

/// A pod that waits.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) pod: Arc<Pod>,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) done: oneshot::Sender<()>,
}

/// A node's gate; clones are the same gate. Made before the data plane, which answers as long as it runs.
#[derive(Clone, Debug)]
pub struct Gate {
    requests: mpsc::Sender<Request>,
    /// For the data plane to take.
    receiver: Arc<Mutex<Option<mpsc::Receiver<Request>>>>,
}

impl Default for Gate {
    fn default() -> Self {
        let (requests, receiver) = mpsc::channel(WAITING);
        Self { requests, receiver: Arc::new(Mutex::new(Some(receiver))) }
    }
}

impl Gate {
    /// Waits until the policies of a pod of this node are in the kernel for these addresses, which its network has just given it.
    ///
    /// # Errors
    /// If the data plane has ended. There is no time limit: the caller sets one.
    pub async fn wait(&self, pod: Arc<Pod>, addresses: Vec<IpAddr>) -> Result<(), GateError> {
        let (done, is_done) = oneshot::channel();
        let request = Request { pod, addresses, done };
        self.requests.send(request).await.map_err(|_closed| GateError::Closed)?;
        is_done.await.map_err(|_closed| GateError::Closed)
    }

    /// Takes the data plane's end; one that was taken before is a new gate that nobody asks.
    pub(super) fn open(&self) -> mpsc::Receiver<Request> {
        self.receiver.lock().take().unwrap_or_else(|| mpsc::channel(1).1)
    }
}
