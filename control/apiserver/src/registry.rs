//! Owns what can be done with stored objects, the same for every kind.

mod convert;
mod create;
mod delete;
mod list;
pub(crate) mod options;
mod output;
mod subresource;
mod update;
mod watch;

pub(crate) use create::{Extra, NewObject, create, now, random_suffix};
pub(crate) use subresource::bind;
pub(crate) use update::{Change, update_object};

use crate::accept::{self, Shape};
use crate::api::{Api, object_key};
use crate::body::{self, Body, ReadError, Response};
use crate::identity::User;
use crate::request_info::{Query, RequestInfo};
use crate::resources::Resource;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode};
use options::WriteOptions;
use serde_json::Value;
use std::sync::Arc;
use weft_control_api::codec::{self, Decoded, FieldValidation};
use weft_control_api::kinds::{Kind, Typed};
use weft_control_api::patch::PatchType;
use weft_control_api::protobuf;
use weft_control_api::status::Status;

/// A request for a resource, authenticated and authorized.
pub(crate) struct Call {
    /// What all requests share.
    pub(crate) api: Arc<Api>,
    /// Who asks.
    pub(crate) user: User,
    /// What for.
    pub(crate) info: RequestInfo,
    /// The query.
    pub(crate) query: Query,
    /// Method, headers and extensions.
    pub(crate) head: http::request::Parts,
    /// Whether the client takes gzip.
    pub(crate) gzip: bool,
    /// The kind as the path names it.
    pub(crate) kind: &'static Kind,
    /// Where it is stored; none for reviews.
    pub(crate) resource: Option<Arc<Resource>>,
}

/// An object as it was written: its JSON in the stored version, and whether it is new.
pub(crate) struct Written {
    /// The object's JSON in the stored version.
    pub(crate) json: Bytes,
    /// Whether it was created by this request.
    pub(crate) created: bool,
    /// What the client should be told.
    pub(crate) warnings: Vec<String>,
}

impl Call {
    /// The stored resource.
    pub(crate) fn stored(&self) -> &Arc<Resource> {
        self.resource.as_ref().expect("requests for what isn't stored are answered by the reviews")
    }

    /// The key of the object that the path names.
    pub(crate) fn key(&self) -> String {
        let namespace = if self.kind.namespaced { self.info.namespace.as_str() } else { "" };
        object_key(namespace, &self.info.name)
    }

    /// The refusal of an object that isn't there.
    pub(crate) fn not_found(&self) -> Status {
        Status::not_found(self.kind.group_resource(), &self.info.name)
    }

    /// Reads the body.
    pub(crate) async fn read(&self, body: Body) -> Result<Bytes, Status> {
        body::read(body, self.api.config.max_request_bytes).await.map_err(|error| match error {
            ReadError::TooLarge { limit_bytes } => Status::request_entity_too_large(limit_bytes),
            ReadError::Broken(source) => Status::bad_request(format!("the body couldn't be read: {source}")),
        })
    }

    /// The media type of the body, without parameters.
    pub(crate) fn content_type(&self) -> &str {
        let value = self.head.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        value.and_then(|v| v.split(';').next()).map_or("application/json", str::trim)
    }

    /// Decodes a body as the kind of the path, and checks that it is for this path.
    pub(crate) fn decode(&self, body: &[u8], options: &WriteOptions) -> Result<Decoded, Status> {
        let decoded = self.decode_as(self.kind, body, options.field_validation)?;
        self.check_path(&decoded.object)?;
        Ok(decoded)
    }

    /// Decodes a body of any type, whatever its media type.
    pub(crate) fn decode_as(
        &self,
        kind: &impl Typed,
        body: &[u8],
        validation: FieldValidation,
    ) -> Result<Decoded, Status> {
        let media_type = self.content_type();
        if media_type == protobuf::MEDIA_TYPE {
            return codec::decode_value(kind, protobuf::read(body)?, validation);
        }
        codec::decode(kind, media_type, body, validation)
    }

    fn check_path(&self, object: &Value) -> Result<(), Status> {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().unwrap_or_default();
        if self.kind.namespaced && !namespace.is_empty() && namespace != self.info.namespace {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        let name = metadata["name"].as_str().unwrap_or_default();
        let on_path = &self.info.name;
        if !on_path.is_empty() && !name.is_empty() && name != on_path {
            return Err(Status::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({on_path})"
            )));
        }
        Ok(())
    }
}

/// Answers a request for a stored resource.
pub(crate) async fn answer(call: Call, body: Body) -> Result<Response, Status> {
    if !call.info.subresource.is_empty() {
        return subresource::answer(call, body).await;
    }
    let unplaced = call.kind.namespaced && call.info.namespace.is_empty() && call.info.named;
    if unplaced || call.info.name.contains('/') {
        return Err(Status::unknown_path());
    }
    let collection = !call.info.named;
    let verb = call.info.verb.as_str();
    let in_place = !call.kind.namespaced || !call.info.namespace.is_empty();
    match (&call.head.method, collection) {
        (&Method::GET, true) if verb == "watch" || call.query.flag("watch") => {
            require_verb(&call, "watch")?;
            watch::answer(&call).await
        }
        (&Method::GET, true) => list::answer(&call).await,
        (&Method::GET, false) if call.query.flag("watch") || verb == "watch" => watch::answer(&call).await,
        (&Method::GET, false) => get(&call).await,
        (&Method::POST, true) if in_place => {
            require_verb(&call, "create")?;
            post(&call, body).await
        }
        (&Method::PUT, false) if in_place => {
            require_verb(&call, "update")?;
            update::put(&call, body).await
        }
        (&Method::PATCH, false) if in_place => {
            require_verb(&call, "patch")?;
            update::patch(&call, body).await
        }
        (&Method::DELETE, false) if in_place => {
            require_verb(&call, "delete")?;
            delete::answer(&call, body).await
        }
        (&Method::DELETE, true) if in_place => {
            require_verb(&call, "deletecollection")?;
            delete::collection(&call, body).await
        }
        _ => Err(Status::method_not_allowed()),
    }
}

fn require_verb(call: &Call, verb: &str) -> Result<(), Status> {
    if call.kind.has_verb(verb) { Ok(()) } else { Err(Status::method_not_allowed()) }
}

/// The patch type of a content type; server-side apply isn't there yet.
pub(crate) fn patch_type(content_type: &str) -> Result<PatchType, Status> {
    PatchType::from_media_type(content_type).ok_or_else(|| {
        Status::unsupported_media_type(&[
            "application/json-patch+json",
            "application/merge-patch+json",
            "application/strategic-merge-patch+json",
        ])
    })
}

/// Which shapes objects are served in.
pub(crate) fn shape(call: &Call) -> Result<Shape, Status> {
    accept::negotiate(&call.head.headers, |shape| !matches!(shape, Shape::Discovery(_)))
}

async fn get(call: &Call) -> Result<Response, Status> {
    let shape = shape(call)?;
    let item = match call.query.get("resourceVersion") {
        Some("0") => call.api.cache.get(call.stored().id, &call.key()),
        Some(text) => {
            options::wait_for_revision(&call.api, text).await?;
            call.api.cache.get(call.stored().id, &call.key())
        }
        None => call.api.fresh(call.stored(), &call.key()).await?,
    };
    let item = item.ok_or_else(|| call.not_found())?;
    output::object(call, shape, StatusCode::OK, item.json())
}

async fn post(call: &Call, body: Body) -> Result<Response, Status> {
    let shape = shape(call)?;
    let options = WriteOptions::of(&call.query)?;
    let body = call.read(body).await?;
    let decoded = call.decode(&body, &options)?;
    let mut warnings = decoded.warnings;
    let new = NewObject {
        kind: call.kind,
        namespace: if call.kind.namespaced { &call.info.namespace } else { "" },
        object: decoded.object,
        dry_run: options.dry_run,
    };
    let written = create(&call.api, &call.user, new).await?;
    warnings.extend(written.warnings);
    let mut response = output::object(call, shape, StatusCode::CREATED, written.json)?;
    crate::reply::warn(response.headers_mut(), &warnings);
    Ok(response)
}
