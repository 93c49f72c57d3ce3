//! Writes a root file system as an OCI image layout in one tar file, the same bytes for the same input.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Time stamp of every entry: it must not differ from build to build.
const EPOCH: u64 = 1_700_000_000;

/// What the image's configuration says.
pub(super) struct Config<'a> {
    pub(super) reference: &'a str,
    pub(super) command: &'a [&'a str],
    pub(super) environment: Vec<&'a str>,
    pub(super) user: &'a str,
    pub(super) stop_signal: &'a str,
    pub(super) port: &'a str,
    /// Folders with another owner than root, and their mode.
    pub(super) owners: &'a [(&'a str, u32, u32)],
}

struct Blob {
    digest: String,
    content: Vec<u8>,
}

impl Blob {
    fn new(content: Vec<u8>) -> Self {
        Self { digest: hex(&Sha256::digest(&content)), content }
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{}", self.digest), "size": self.content.len()})
    }
}

/// Writes `archive` from the files below `rootfs`.
pub(super) fn write(config: &Config<'_>, rootfs: &Path, archive: &Path) -> anyhow::Result<()> {
    let (layer, diff_id) = layer(config, rootfs)?;
    let image = Blob::new(serde_json::to_vec(&image_config(config, &diff_id))?);
    let manifest = Blob::new(serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": image.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar+gzip")],
    }))?);
    let mut entry = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    let tag = config.reference.rsplit(':').next().unwrap_or_default();
    entry["annotations"] = json!({
        "io.containerd.image.name": config.reference,
        "org.opencontainers.image.ref.name": tag,
    });
    let index = serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]}))?;
    let fresh = archive.with_extension("new");
    let mut tar =
        tar::Builder::new(File::create(&fresh).with_context(|| format!("cannot write {}", fresh.display()))?);
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", &index)?;
    for blob in [&layer, &image, &manifest] {
        append(&mut tar, &format!("blobs/sha256/{}", blob.digest), &blob.content)?;
    }
    tar.into_inner()?.flush()?;
    fs::rename(&fresh, archive).context("put the archive in place")
}

fn image_config(config: &Config<'_>, diff_id: &str) -> Value {
    let mut run = json!({"Env": config.environment, "Cmd": config.command, "WorkingDir": "/"});
    if !config.user.is_empty() {
        run["User"] = json!(config.user);
    }
    if !config.stop_signal.is_empty() {
        run["StopSignal"] = json!(config.stop_signal);
    }
    if !config.port.is_empty() {
        run["ExposedPorts"] = json!({config.port: {}});
    }
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    json!({
        "architecture": architecture,
        "os": "linux",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    })
}

/// The compressed layer and the digest of its uncompressed form.
fn layer(config: &Config<'_>, rootfs: &Path) -> anyhow::Result<(Blob, String)> {
    let mut plain = Hashing { inner: GzEncoder::new(Vec::new(), Compression::fast()), hash: Sha256::new() };
    {
        let mut tar = tar::Builder::new(&mut plain);
        let mut paths = Vec::new();
        walk(rootfs, rootfs, &mut paths)?;
        for path in paths {
            add(&mut tar, config, rootfs, &path)?;
        }
        tar.finish()?;
    }
    let diff_id = hex(&plain.hash.finalize());
    Ok((Blob::new(plain.inner.finish()?), diff_id))
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        found.push(path.strip_prefix(root)?.to_path_buf());
        if entry.file_type()?.is_dir() {
            walk(root, &path, found)?;
        }
    }
    Ok(())
}

fn add<W: Write>(
    tar: &mut tar::Builder<W>,
    config: &Config<'_>,
    rootfs: &Path,
    path: &Path,
) -> anyhow::Result<()> {
    let full = rootfs.join(path);
    let meta = fs::symlink_metadata(&full)?;
    let mut header = tar::Header::new_gnu();
    header.set_mtime(EPOCH);
    let owned = config.owners.iter().find(|(folder, _, _)| path == Path::new(folder));
    let owner = owned.map_or(0, |(_, owner, _)| u64::from(*owner));
    header.set_uid(owner);
    header.set_gid(owner);
    let shared = path == Path::new("tmp");
    let mode = if shared { 0o1777 } else { meta.permissions().mode() & 0o7777 };
    header.set_mode(owned.map_or(mode, |(_, _, mode)| *mode));
    if meta.is_symlink() {
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, path, fs::read_link(&full)?)?;
    } else if meta.is_dir() {
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        tar.append_data(&mut header, path, io::empty())?;
    } else {
        header.set_size(meta.len());
        tar.append_data(&mut header, path, File::open(&full)?)?;
    }
    Ok(())
}

fn append<W: Write>(tar: &mut tar::Builder<W>, name: &str, content: &[u8]) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(EPOCH);
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, name, content)?;
    Ok(())
}

/// Hashes what passes through to a writer.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hash.update(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
