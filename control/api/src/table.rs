//! Table output: the columns and cells that kubectl prints for each kind.
//!
//! A cell is a JSON string, integer or boolean. Columns of priority 1 are always filled; kubectl hides them without
//! `-o wide`.

mod cluster;
mod columns;
mod config;
mod duration;
mod format;
mod network;
mod pod;
mod policy;
mod storage;
#[cfg(test)]
mod tests;
mod workload;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::Kind;

pub use duration::{human_duration, short_human_duration};
pub(crate) use format::selector_text;

/// One column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Heading; kubectl prints it in capitals.
    pub name: &'static str,
    /// OpenAPI type of the cells: `string`, `integer`, `boolean` or `date`.
    pub type_: &'static str,
    /// OpenAPI format; `name` marks the column that names the object.
    pub format: &'static str,
    /// 0 is always shown, 1 only with `-o wide`.
    pub priority: i32,
}

impl Column {
    /// The `metav1.TableColumnDefinition`; `description` is required there and left empty here.
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "type": self.type_,
            "format": self.format,
            "description": "",
            "priority": self.priority,
        })
    }
}

/// The columns of a kind.
pub fn columns(kind: &Kind) -> &'static [Column] {
    columns::of(kind.group, kind.kind)
}

/// The cells of one object, in the order of [`columns`]. Ages are measured at `now`.
pub fn row(kind: &Kind, object: &Value, now: Timestamp) -> Vec<Value> {
    cells(kind.group, kind.kind, object, now)
}

/// The `metav1.TableRowCondition`s of one object: `Completed` for pods that ended.
pub fn conditions(kind: &Kind, object: &Value) -> Vec<Value> {
    if (kind.group, kind.kind) != ("", "Pod") {
        return Vec::new();
    }
    let message = match object["status"]["phase"].as_str() {
        Some("Succeeded") => "The pod has completed successfully.",
        Some("Failed") => "The pod failed.",
        Some(_) | None => return Vec::new(),
    };
    vec![json!({
        "type": "Completed",
        "status": "True",
        "reason": object["status"]["phase"],
        "message": message,
    })]
}

fn cells(group: &str, kind: &str, object: &Value, now: Timestamp) -> Vec<Value> {
    let families = [workload::row, network::row, cluster::row, config::row, storage::row, policy::row];
    if (group, kind) == ("", "Pod") {
        return pod::row(object, now);
    }
    families.iter().find_map(|family| family(group, kind, object, now)).unwrap_or_else(|| {
        vec![object["metadata"]["name"].clone(), object["metadata"]["creationTimestamp"].clone()]
    })
}
