//! Validation of Jobs and CronJobs.

use serde_json::Value;

use super::super::Change;
use super::super::checks::{
    Errors, immutable, label_selector, not_negative, one_of, optional_one_of, required,
};
use super::super::pod;
use super::super::value::{copy, entries, is_empty, same, text};
use crate::field::{FieldError, FieldPath};

/// Most indexes of an indexed Job.
const MAX_PARALLELISM_INDEXED: i64 = 100_000;

pub(super) fn job(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    job_spec(errors, &path, spec);
    let selector = &spec["selector"];
    if selector.is_null() {
        errors.push(FieldError::required(&path.child("selector"), ""));
        return;
    }
    label_selector(errors, &path.child("selector"), selector);
    let labels = &spec["template"]["metadata"]["labels"];
    let matches = entries(&selector["matchLabels"]).all(|(key, value)| labels[key] == *value);
    if !matches {
        let path = path.child("template").child("metadata").child("labels");
        errors.push(FieldError::invalid(
            &path,
            labels.clone(),
            "`selector` does not match template `labels`",
        ));
    }
}

fn job_spec(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let numbers = [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ];
    for field in numbers {
        not_negative(errors, &path.child(field), &spec[field]);
    }
    optional_one_of(
        errors,
        &path.child("completionMode"),
        &spec["completionMode"],
        &["Indexed", "NonIndexed"],
    );
    let indexed = spec["completionMode"] == "Indexed";
    if indexed && spec["completions"].is_null() {
        errors.push(FieldError::required(&path.child("completions"), "when completion mode is Indexed"));
    }
    if indexed
        && spec["parallelism"].as_i64().is_some_and(|parallelism| parallelism > MAX_PARALLELISM_INDEXED)
    {
        let detail = format!(
            "must be less than or equal to {MAX_PARALLELISM_INDEXED} when completion mode is Indexed"
        );
        errors.push(FieldError::invalid(&path.child("parallelism"), spec["parallelism"].clone(), detail));
    }
    if !indexed {
        for field in ["backoffLimitPerIndex", "maxFailedIndexes"] {
            if !spec[field].is_null() {
                let detail = "requires indexed completion mode";
                errors.push(FieldError::invalid(&path.child(field), spec[field].clone(), detail));
            }
        }
    }
    let replacements: &[&str] =
        if spec["podFailurePolicy"].is_null() { &["Failed", "TerminatingOrFailed"] } else { &["Failed"] };
    optional_one_of(errors, &path.child("podReplacementPolicy"), &spec["podReplacementPolicy"], replacements);
    let path = path.child("template");
    pod::template(errors, &path, &spec["template"]);
    // An absent policy was defaulted to Always, which a Job can't have.
    let policy = &spec["template"]["spec"]["restartPolicy"];
    let path = path.child("spec").child("restartPolicy");
    match text(policy) {
        "" | "Always" => errors.push(FieldError::required(&path, "valid values: \"OnFailure\", \"Never\"")),
        "OnFailure" if !spec["podFailurePolicy"].is_null() => {
            let detail = "only \"Never\" is supported when podFailurePolicy is specified";
            errors.push(FieldError::invalid(&path, policy.clone(), detail));
        }
        _ => optional_one_of(errors, &path, policy, &["Never", "OnFailure"]),
    }
}

pub(super) fn job_update(change: &Change<'_>, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let (new, old) = (&change.new["spec"], &change.old["spec"]);
    job_spec(errors, &path, new);
    if new["completionMode"] != "Indexed" || new["completions"] != new["parallelism"] {
        immutable(errors, &path.child("completions"), &new["completions"], &old["completions"]);
    }
    for field in [
        "selector",
        "completionMode",
        "podFailurePolicy",
        "backoffLimitPerIndex",
        "managedBy",
        "successPolicy",
    ] {
        immutable(errors, &path.child(field), &new[field], &old[field]);
    }
    let never_started = change.old["status"]["startTime"].is_null();
    let mut template = new["template"].clone();
    if old["suspend"] == true && never_started {
        steering(&mut template, &old["template"]);
    }
    if !same(&template, &old["template"]) {
        errors.push(FieldError::invalid(
            &path.child("template"),
            new["template"].clone(),
            "field is immutable",
        ));
    }
}

/// A Job that is suspended and never started may still be steered elsewhere: puts back what may change.
fn steering(template: &mut Value, old: &Value) {
    if let Some(spec) = template.get_mut("spec") {
        for field in ["nodeSelector", "tolerations", "schedulingGates", "affinity"] {
            copy(spec, &old["spec"], field);
        }
    }
    if let Some(metadata) = template.get_mut("metadata") {
        for field in ["labels", "annotations"] {
            copy(metadata, &old["metadata"], field);
        }
    }
}

pub(super) fn cron_job(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if required(errors, &path.child("schedule"), &spec["schedule"]) {
        schedule(errors, &path.child("schedule"), text(&spec["schedule"]), !spec["timeZone"].is_null());
    }
    if let Some(zone) = spec["timeZone"].as_str() {
        time_zone(errors, &path.child("timeZone"), zone);
    }
    not_negative(errors, &path.child("startingDeadlineSeconds"), &spec["startingDeadlineSeconds"]);
    one_of(
        errors,
        &path.child("concurrencyPolicy"),
        &spec["concurrencyPolicy"],
        &["Allow", "Forbid", "Replace"],
    );
    for field in ["successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
        not_negative(errors, &path.child(field), &spec[field]);
    }
    let (path, job) = (path.child("jobTemplate").child("spec"), &spec["jobTemplate"]["spec"]);
    job_spec(errors, &path, job);
    if !is_empty(&job["selector"]) {
        errors.push(FieldError::invalid(
            &path.child("selector"),
            job["selector"].clone(),
            "`selector` will be auto-generated",
        ));
    }
    if job["manualSelector"] == true {
        errors.push(FieldError::not_supported(&path.child("manualSelector"), true, &["nil", "false"]));
    }
}

const DESCRIPTORS: [&str; 7] =
    ["@annually", "@daily", "@hourly", "@midnight", "@monthly", "@weekly", "@yearly"];

fn schedule(errors: &mut Errors, path: &FieldPath, schedule: &str, has_zone: bool) {
    if schedule.contains("TZ") {
        let detail = if has_zone {
            "cannot use both timeZone field and TZ or CRON_TZ in schedule"
        } else {
            "cannot use TZ or CRON_TZ in schedule, use timeZone field instead"
        };
        errors.push(FieldError::invalid(path, schedule, detail));
        return;
    }
    if schedule.starts_with('@') {
        if !DESCRIPTORS.contains(&schedule) && !schedule.starts_with("@every ") {
            errors.push(FieldError::invalid(path, schedule, format!("unrecognized descriptor: {schedule}")));
        }
        return;
    }
    let fields: Vec<&str> = schedule.split_whitespace().collect();
    if fields.len() != 5 {
        let detail = format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" "));
        errors.push(FieldError::invalid(path, schedule, detail));
    }
}

fn time_zone(errors: &mut Errors, path: &FieldPath, zone: &str) {
    if zone.is_empty() {
        errors.push(FieldError::invalid(path, zone, "timeZone must be nil or non-empty string"));
    } else if zone.eq_ignore_ascii_case("local") {
        errors.push(FieldError::invalid(
            path,
            zone,
            "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones",
        ));
    } else if jiff::tz::TimeZone::get(zone).is_err() {
        errors.push(FieldError::invalid(path, zone, format!("unknown time zone {zone}")));
    }
}
