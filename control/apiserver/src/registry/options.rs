//! Owns the parameters of requests: dry run, field validation, revisions, paging.

use crate::api::{Api, too_large};
use crate::request_info::Query;
use std::time::Duration;
use weft_control_api::codec::FieldValidation;
use weft_control_api::status::Status;

/// How long a read waits for a revision that isn't there yet, as upstream.
const REVISION_WAIT: Duration = Duration::from_secs(3);

/// Parameters of a write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WriteOptions {
    /// Do everything but write.
    pub(crate) dry_run: bool,
    /// What to do about unknown and duplicate fields.
    pub(crate) field_validation: FieldValidation,
}

impl WriteOptions {
    /// Reads them from the query.
    pub(crate) fn of(query: &Query) -> Result<Self, Status> {
        let field_validation = match query.get("fieldValidation") {
            None | Some("Warn") => FieldValidation::Warn,
            Some("Ignore") => FieldValidation::Ignore,
            Some("Strict") => FieldValidation::Strict,
            Some(other) => {
                return Err(Status::bad_request(format!(
                    "invalid field validation directive {other:?}: must be one of Ignore, Warn, Strict"
                )));
            }
        };
        let dry_run = dry_run(query.all("dryRun").iter().map(String::as_str))?;
        Ok(Self { dry_run, field_validation })
    }
}

/// Whether `dryRun` asks for a dry run; `All` is all there is.
pub(crate) fn dry_run<'a>(values: impl Iterator<Item = &'a str>) -> Result<bool, Status> {
    let mut dry = false;
    for value in values.filter(|v| !v.is_empty()) {
        if value != "All" {
            return Err(Status::bad_request(format!(
                "dryRun: Unsupported value: {value:?}: supported values: \"All\""
            )));
        }
        dry = true;
    }
    Ok(dry)
}

/// Reads a resourceVersion.
pub(crate) fn revision(text: &str) -> Result<u64, Status> {
    text.parse().map_err(|_ignored| {
        Status::bad_request(format!(
            "invalid resource version {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"
        ))
    })
}

/// Waits until the cache shows a revision that a client has named.
pub(crate) async fn wait_for_revision(api: &Api, text: &str) -> Result<u64, Status> {
    let wanted = revision(text)?;
    match tokio::time::timeout(REVISION_WAIT, api.cache.wait_for(wanted)).await {
        Ok(()) => Ok(wanted),
        Err(_elapsed) => Err(too_large(wanted, api.cache.revision())),
    }
}
