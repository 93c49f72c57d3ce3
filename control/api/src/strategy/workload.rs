//! The kinds that own pods.

mod apps;
mod batch;
mod defaults;
mod scaling;

use serde_json::Value;

use super::Change;
use super::checks::Errors;

pub(super) use defaults::apply as default;

pub(super) fn create(group: &str, kind: &str, object: &Value, errors: &mut Errors) {
    match (group, kind) {
        ("" | "apps", _) => apps::create(kind, object, errors),
        ("batch", "Job") => batch::job(object, errors),
        ("batch", "CronJob") => batch::cron_job(object, errors),
        ("autoscaling", "HorizontalPodAutoscaler") => scaling::autoscaler(object, errors),
        ("policy", "PodDisruptionBudget") => scaling::disruption_budget(object, errors),
        _ => {}
    }
}

pub(super) fn update(group: &str, kind: &str, change: &Change<'_>, errors: &mut Errors) {
    match (group, kind, change.subresource) {
        ("" | "apps", _, subresource) => apps::update(kind, subresource, change, errors),
        ("batch", "Job", None) => batch::job_update(change, errors),
        ("batch", "CronJob", None) => batch::cron_job(change.new, errors),
        ("autoscaling", "HorizontalPodAutoscaler", None) => scaling::autoscaler(change.new, errors),
        ("policy", "PodDisruptionBudget", None) => scaling::disruption_budget(change.new, errors),
        _ => {}
    }
}
