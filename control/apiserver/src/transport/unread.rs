//! A request's body that its handler may leave unread: the rest is read before the response goes out.
//!
//! A server that answers and closes while bytes are still coming resets the connection, and the client loses the answer with
//! it. Like upstream's, this one reads on for a while.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;

use crate::body::BoxError;

/// As much as upstream reads of a body that nobody wants.
const MAX_UNREAD_BYTES: usize = 256 * 1024;
/// A client that sends more slowly than this loses the answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Keeps the body while its handler has only a loan of it.
#[derive(Clone)]
pub(super) struct Unread(Arc<Mutex<Incoming>>);

/// The handler's side.
pub(super) struct Loan(Arc<Mutex<Incoming>>);

pub(super) fn lend(body: Incoming) -> (Unread, Loan) {
    let body = Arc::new(Mutex::new(body));
    (Unread(body.clone()), Loan(body))
}

impl http_body::Body for Loan {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut *self.0.lock()).poll_frame(context).map_err(BoxError::from)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().size_hint()
    }
}

impl Unread {
    /// Reads what the handler left.
    pub(super) async fn drain(self) {
        if self.0.lock().is_end_stream() {
            return;
        }
        let mut rest = Loan(self.0);
        let read = async {
            let mut left = MAX_UNREAD_BYTES;
            while let Some(Ok(frame)) = rest.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                let Some(less) = left.checked_sub(length) else { return };
                left = less;
            }
        };
        // Too slow or too long: the answer may be lost, as it would be with upstream.
        let _ = tokio::time::timeout(PATIENCE, read).await;
    }
}
