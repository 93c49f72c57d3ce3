//! Image archives, built in memory for a test.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// One layer's archive.
pub(crate) struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(mode: u32, size: u64, kind: tar::EntryType) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(size);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_entry_type(kind);
        header
    }

    pub(crate) fn folder(mut self, path: &str, mode: u32) -> Self {
        let mut header = Self::header(mode, 0, tar::EntryType::Directory);
        self.0.append_data(&mut header, path, std::io::empty()).unwrap();
        self
    }

    pub(crate) fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        let mut header = Self::header(mode, content.len() as u64, tar::EntryType::Regular);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    pub(crate) fn owned(mut self, path: &str, uid: u64, gid: u64) -> Self {
        let mut header = Self::header(0o4755, 0, tar::EntryType::Regular);
        header.set_uid(uid);
        header.set_gid(gid);
        self.0.append_data(&mut header, path, std::io::empty()).unwrap();
        self
    }

    pub(crate) fn link(mut self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        let mut header = Self::header(0o777, 0, kind);
        self.0.append_link(&mut header, path, target).unwrap();
        self
    }

    pub(crate) fn xattr(mut self, path: &str, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0.append_pax_extensions([(key.as_str(), value)]).unwrap();
        self.file(path, 0o755, b"x")
    }

    /// An entry whose name the tar crate would refuse to write.
    pub(crate) fn raw(mut self, path: &str, content: &[u8]) -> Self {
        let mut header = Self::header(0o644, content.len() as u64, tar::EntryType::Regular);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn build(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// How layers lie in an archive.
#[derive(Clone, Copy)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

pub(crate) fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

/// An image to be written in one of the formats.
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) config: Value,
    pub(crate) layers: Vec<Vec<u8>>,
    pub(crate) compression: Compression,
}

impl Image {
    pub(crate) fn new(name: &str, config: Value, layers: Vec<Vec<u8>>) -> Self {
        Self { name: name.to_owned(), config, layers, compression: Compression::None }
    }

    fn config_text(&self) -> Vec<u8> {
        let diff_ids: Vec<String> = self.layers.iter().map(|layer| digest(layer)).collect();
        let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({"architecture": arch, "os": "linux", "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        config.to_string().into_bytes()
    }

    /// Files of an OCI layout.
    pub(crate) fn oci(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut blob = |content: Vec<u8>| {
            let (digest, size) = (digest(&content), content.len());
            files.insert(format!("blobs/sha256/{}", &digest[7..]), content);
            json!({"digest": digest, "size": size, "mediaType": "application/octet-stream"})
        };
        let layers: Vec<Value> =
            self.layers.iter().map(|layer| blob(compress(layer, self.compression))).collect();
        let config = blob(self.config_text());
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        let mut manifest = blob(manifest.to_string().into_bytes());
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": self.name});
        let foreign = json!({"digest": digest(b""), "platform": {"os": "plan9", "architecture": "mips"}});
        files.insert(
            "index.json".to_owned(),
            json!({"manifests": [foreign, manifest]}).to_string().into_bytes(),
        );
        files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        files
    }

    /// Files of an archive of `docker save`.
    pub(crate) fn docker(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut layers = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let path = format!("{index}/layer.tar");
            files.insert(path.clone(), compress(layer, self.compression));
            layers.push(path);
        }
        files.insert("config.json".to_owned(), self.config_text());
        let manifest = json!([{"Config": "config.json", "RepoTags": [self.name], "Layers": layers}]);
        files.insert("manifest.json".to_owned(), manifest.to_string().into_bytes());
        files
    }

    /// An OCI layout as one tar file.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join(format!("{}.tar", digest(self.name.as_bytes())));
        write_tar(&path, &self.oci());
        path
    }
}

pub(crate) fn write_tar(path: &Path, files: &BTreeMap<String, Vec<u8>>) {
    let mut archive = Layer::new();
    for (name, content) in files {
        archive = archive.file(name, 0o644, content);
    }
    std::fs::write(path, archive.build()).unwrap();
}

pub(crate) fn write_folder(folder: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, content) in files {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

/// Debian's static busybox with its usual links, users `www` (33) and `root`.
pub(crate) fn busybox(name: &str, config: Value) -> Image {
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let mut layer = Layer::new()
        .folder("bin/", 0o755)
        .folder("etc/", 0o755)
        .folder("tmp/", 0o1777)
        .folder("root/", 0o700);
    layer = layer.file("bin/busybox", 0o755, &busybox);
    for applet in [
        "sh", "echo", "sleep", "cat", "id", "env", "ls", "mount", "touch", "dd", "hostname", "pwd", "stat",
        "ps", "head", "grep", "unshare", "tty", "ip", "ping", "true", "mkdir", "readlink", "yes", "tail",
        "mknod", "kill", "wc", "seq",
    ] {
        layer = layer.link(tar::EntryType::Symlink, &format!("bin/{applet}"), "busybox");
    }
    layer =
        layer.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/var/www:/bin/false\n");
    layer = layer.file("etc/group", 0o644, b"root:x:0:\nwww:x:34:\nlogs:x:50:www\n");
    Image::new(name, config, vec![layer.build()])
}
