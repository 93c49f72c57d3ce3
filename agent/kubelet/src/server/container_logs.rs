//! `GET /containerLogs/{namespace}/{pod}/{container}`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use weft_agent_runtime::{ContainerState, RuntimeEvent};

use super::{Query, find, runtime_error};
use crate::clock;
use crate::logs::{self, Options};
use crate::shared::Shared;

/// Chunks on their way to a slow reader.
const QUEUE: usize = 8;

fn options(query: &Query) -> Result<(Options, bool), String> {
    let number = |name: &str| match query.get(name) {
        None | Some("") => Ok(None),
        Some(text) => {
            text.parse::<u64>().map(Some).map_err(|_bad| format!("invalid value {text:?} for {name}"))
        }
    };
    let since = match (number("sinceSeconds")?, query.get("sinceTime")) {
        (Some(seconds), _) => clock::now().checked_sub(Duration::from_secs(seconds)).ok(),
        (None, Some(text)) if !text.is_empty() => {
            Some(text.parse().map_err(|_bad| format!("invalid value {text:?} for sinceTime"))?)
        }
        _ => None,
    };
    let options = Options {
        follow: query.flag(&["follow"]),
        timestamps: query.flag(&["timestamps"]),
        since,
        tail: number("tailLines")?,
        limit_bytes: number("limitBytes")?,
    };
    Ok((options, query.flag(&["previous"])))
}

/// Streams a container's log.
pub(super) async fn serve(shared: Arc<Shared>, target: (&str, &str, &str), query: &Query) -> Response {
    let (options, previous) = match options(query) {
        Ok(read) => read,
        Err(text) => return (StatusCode::BAD_REQUEST, text).into_response(),
    };
    let id = match find(&shared, target, previous) {
        Ok(id) => id,
        Err(response) => return *response,
    };
    let path = match shared.runtime.log_path(&id).await {
        Ok(path) => path,
        Err(error) => return runtime_error(&error),
    };
    let (sink, receiver) = mpsc::channel(QUEUE);
    let events = shared.runtime.events();
    // Ends with the reader: a closed channel ends the copy.
    tokio::spawn(async move {
        let ended = ended(&shared, &id, events);
        if let Err(error) = logs::copy(&path, &options, &sink, ended).await {
            // A reader that is gone needs no error.
            let _ = sink.send(Err(error)).await;
        }
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    ([(http::header::CONTENT_TYPE, "text/plain")], body).into_response()
}

/// Resolves when the container has ended.
async fn ended(shared: &Shared, id: &str, mut events: broadcast::Receiver<RuntimeEvent>) {
    loop {
        match shared.runtime.container(id).await {
            Ok(container)
                if matches!(container.state, ContainerState::Running { .. } | ContainerState::Created) => {}
            Ok(_) | Err(_) => return,
        }
        loop {
            match events.recv().await {
                Ok(RuntimeEvent::ContainerExited { container_id, .. }) if container_id == id => break,
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => break,
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}
