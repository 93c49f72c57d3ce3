//! Volumes of a pod: prepared before its sandbox, kept fresh while it lives, unmounted and removed after it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Volume};

use crate::env::Facts;
use crate::pod::{self, PodId};
use crate::shared::Shared;

pub(crate) mod atomic;
mod empty_dir;
mod host_path;
pub(crate) mod keep;
pub(crate) mod memory;
pub(crate) mod mounts;
mod ownership;
pub(crate) mod payload;
pub(crate) mod remove;

/// A volume that can't be prepared.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume \"{volume}\" : {reason}")]
pub(crate) struct Error {
    pub(crate) volume: String,
    pub(crate) reason: String,
}

/// The prepared volumes of a pod: name → path on the node.
#[derive(Debug, Default)]
pub(crate) struct Mounted {
    pub(crate) paths: BTreeMap<String, PathBuf>,
}

/// The kinds of source, told apart once.
enum Source<'a> {
    EmptyDir(&'a k8s_openapi::api::core::v1::EmptyDirVolumeSource),
    HostPath(&'a k8s_openapi::api::core::v1::HostPathVolumeSource),
    /// Written by the kubelet.
    Written(Written),
    Unsupported,
}

/// A volume that the kubelet writes: configMap, secret, downwardAPI, projected.
#[derive(Clone, Copy)]
struct Written {
    /// Upstream's name of the folder of such volumes.
    plugin: &'static str,
    /// Whether it never gets to a disk.
    in_memory: bool,
}

impl Written {
    fn source<'a>(plugin: &'static str, in_memory: bool) -> Source<'a> {
        Source::Written(Self { plugin, in_memory })
    }

    /// The folder of such a volume of a pod, which is made if it lies in memory.
    fn folder(self, shared: &Shared, pod: &Pod, volume: &str) -> io::Result<PathBuf> {
        let dir = pod_dir(shared, pod).join("volumes").join(self.plugin).join(volume);
        if !self.in_memory {
            return Ok(dir);
        }
        let folder = shared.config.memory_dir().join(PodId::of(pod).uid).join(self.plugin).join(volume);
        memory::place(&dir, folder)
    }
}

fn source(volume: &Volume) -> Source<'_> {
    if let Some(empty) = &volume.empty_dir {
        Source::EmptyDir(empty)
    } else if let Some(host) = &volume.host_path {
        Source::HostPath(host)
    } else if volume.config_map.is_some() {
        Written::source("kubernetes.io~configmap", false)
    } else if volume.secret.is_some() {
        Written::source("kubernetes.io~secret", true)
    } else if volume.downward_api.is_some() {
        Written::source("kubernetes.io~downward-api", true)
    } else if volume.projected.is_some() {
        Written::source("kubernetes.io~projected", true)
    } else {
        Source::Unsupported
    }
}

/// The pod's folder on the node.
pub(crate) fn pod_dir(shared: &Shared, pod: &Pod) -> PathBuf {
    shared.config.pods_dir().join(PodId::of(pod).uid)
}

fn used(pod: &Pod, volume: &str) -> bool {
    pod::all_containers(pod).any(|(c, _)| c.volume_mounts.iter().flatten().any(|m| m.name == volume))
}

/// Prepares every volume that a container mounts. May be repeated; what is right already stays.
pub(crate) async fn prepare(shared: Arc<Shared>, pod: Arc<Pod>, facts: Facts) -> Result<Mounted, Error> {
    let mut mounted = Mounted::default();
    for volume in pod::spec(&pod).volumes.iter().flatten().filter(|v| used(&pod, &v.name)) {
        let failed = |reason: String| Error { volume: volume.name.clone(), reason };
        let path = match source(volume) {
            Source::EmptyDir(empty) => {
                let dir = pod_dir(&shared, &pod).join("volumes/kubernetes.io~empty-dir").join(&volume.name);
                empty_dir::prepare(&dir, empty).map_err(|e| failed(e.to_string()))?;
                ownership::apply(&dir, &pod).map_err(|e| failed(e.to_string()))?;
                dir
            }
            Source::HostPath(host) => host_path::prepare(host).map_err(failed)?,
            Source::Written(written) => {
                let dir = written.folder(&shared, &pod, &volume.name).map_err(|e| failed(e.to_string()))?;
                write(&shared, &pod, volume, (&dir, &facts)).await.map_err(failed)?;
                dir
            }
            Source::Unsupported => {
                return Err(failed("this kind of volume is not supported by this node".into()));
            }
        };
        mounted.paths.insert(volume.name.clone(), path);
    }
    Ok(mounted)
}

/// Writes a volume's files; when to write them again at the latest.
async fn write(
    shared: &Shared,
    pod: &Pod,
    volume: &Volume,
    (dir, facts): (&Path, &Facts),
) -> Result<Option<jiff::Timestamp>, String> {
    let payload = payload::make(shared, pod, volume, facts).await.map_err(|e| e.to_string())?;
    let group = ownership::fs_group(pod);
    let (dir, files) = (dir.to_owned(), payload.files);
    // Small files, but files nevertheless: not on an async worker.
    tokio::task::spawn_blocking(move || atomic::write(&dir, &files, group))
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| weft_agent_runtime::chain(&e))?;
    Ok(payload.renew_at)
}
