//! The images that the sample and the tests run: real programs from Debian's packages, as OCI archives.

mod oci;

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::steps::{quiet, root, step, target};

/// What an image is made from.
struct Recipe {
    /// File name of the archive, without its ending.
    file: &'static str,
    /// Reference that a manifest names it by.
    reference: &'static str,
    packages: &'static [&'static str],
    command: &'static [&'static str],
    environment: &'static [&'static str],
    /// `user:group` by number, or empty for root.
    user: &'static str,
    stop_signal: &'static str,
    port: &'static str,
    /// Files of the workspace laid over the packages.
    overlay: &'static [(&'static str, &'static str)],
    /// Folders to make, with owner and mode.
    folders: &'static [(&'static str, u32, u32)],
}

const LIBC: &str = "libc6";

const RECIPES: &[Recipe] = &[
    Recipe {
        file: "busybox",
        reference: "docker.io/library/busybox:latest",
        // The C library's files are for the resolver: a static program loads them to look up names.
        packages: &["busybox-static", LIBC],
        command: &["sh"],
        environment: &[],
        user: "",
        stop_signal: "",
        port: "",
        overlay: &[],
        folders: &[("home", 0, 0o755)],
    },
    Recipe {
        file: "nginx",
        reference: "docker.io/library/nginx:1.22",
        packages: &[
            "nginx",
            "nginx-common",
            LIBC,
            "libcrypt1",
            "libpcre2-8-0",
            "libssl3",
            "zlib1g",
            "busybox-static",
        ],
        command: &["nginx", "-g", "daemon off;"],
        environment: &[],
        user: "",
        stop_signal: "SIGQUIT",
        port: "80/tcp",
        overlay: &[
            ("tests/xtask/images/nginx.conf", "etc/nginx/nginx.conf"),
            ("tests/xtask/images/index.html", "usr/share/nginx/html/index.html"),
        ],
        folders: &[("var/log/nginx", 0, 0o755), ("var/lib/nginx", 33, 0o755), ("etc/nginx/conf.d", 0, 0o755)],
    },
    Recipe {
        file: "postgres",
        reference: "docker.io/library/postgres:15",
        packages: &[
            "postgresql-15",
            "postgresql-client-15",
            "libpq5",
            LIBC,
            "libaudit1",
            "libcap-ng0",
            "libcap2",
            "libcom-err2",
            "libffi8",
            "libgcc-s1",
            "libgcrypt20",
            "libgmp10",
            "libgnutls30",
            "libgpg-error0",
            "libgssapi-krb5-2",
            "libhogweed6",
            "libicu72",
            "libidn2-0",
            "libk5crypto3",
            "libkeyutils1",
            "libkrb5-3",
            "libkrb5support0",
            "libldap-2.5-0",
            "liblz4-1",
            "liblzma5",
            "libnettle8",
            "libp11-kit0",
            "libpam0g",
            "libreadline8",
            "libsasl2-2",
            "libssl3",
            "libstdc++6",
            "libsystemd0",
            "libtasn1-6",
            "libtinfo6",
            "libunistring2",
            "libxml2",
            "libxslt1.1",
            "libzstd1",
            "zlib1g",
            "tzdata",
            "busybox-static",
        ],
        command: &["/usr/local/bin/start-postgres"],
        environment: &["PGDATA=/var/lib/postgresql/data"],
        user: "999:999",
        stop_signal: "SIGINT",
        port: "5432/tcp",
        overlay: &[("tests/xtask/images/start-postgres", "usr/local/bin/start-postgres")],
        folders: &[
            ("var/lib/postgresql/data", 999, 0o700),
            ("var/run/postgresql", 999, 0o775),
            ("run/postgresql", 999, 0o775),
        ],
    },
];

/// What the network tests run, with busybox beside it.
const PROBE: Recipe = Recipe {
    file: "probe",
    reference: "docker.io/library/weft-probe:1",
    packages: &["busybox-static", LIBC],
    command: &["weft-probe", "serve", "80/tcp", "80/udp"],
    environment: &[],
    user: "",
    stop_signal: "SIGKILL",
    port: "",
    overlay: &[("target/artifacts/weft-probe", "usr/local/bin/weft-probe")],
    folders: &[],
};

/// What holds the namespaces of a pod of upstream's, where a benchmark measures it. It only waits.
const PAUSE: Recipe = Recipe {
    file: "pause",
    reference: "docker.io/library/weft-pause:1",
    packages: &["busybox-static"],
    command: &["sleep", "2147483647"],
    environment: &[],
    user: "",
    stop_signal: "SIGKILL",
    port: "",
    overlay: &[],
    folders: &[],
};

const PATH: &str =
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin";
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\n\
    postgres:x:999:999:postgres:/var/lib/postgresql:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUP: &str = "root:x:0:\nadm:x:4:\nwww-data:x:33:\npostgres:x:999:\nnogroup:x:65534:\n";
/// Not needed at run time.
const TRIMMED: &[&str] = &[
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/lib/postgresql/15/lib/bitcode",
];

/// Builds the archives of the sample that are missing or older than this program; answers their paths.
pub(crate) fn build_all() -> anyhow::Result<Vec<PathBuf>> {
    build_stale(RECIPES)
}

/// Builds the archives that only tests and benchmarks use.
pub(crate) fn build_for_tests() -> anyhow::Result<()> {
    crate::artifacts::build_probe()?;
    build_stale(&[PROBE, PAUSE]).map(|_| ())
}

fn build_stale(recipes: &[Recipe]) -> anyhow::Result<Vec<PathBuf>> {
    let folder = target("images")?;
    let mut archives = Vec::new();
    for recipe in recipes {
        let archive = folder.join(format!("{}.tar", recipe.file));
        let stamp = folder.join(format!("{}.recipe", recipe.file));
        let wanted = fingerprint(recipe)?;
        let current = fs::read_to_string(&stamp).unwrap_or_default();
        if !archive.is_file() || current != wanted {
            step(&format!("build the image {}", recipe.reference), || build(recipe, &folder, &archive))?;
            fs::write(&stamp, wanted)?;
        }
        archives.push(archive);
    }
    Ok(archives)
}

/// Everything that decides what is in the archive, packages' versions aside.
fn fingerprint(recipe: &Recipe) -> anyhow::Result<String> {
    let mut text =
        format!("{} {:?} {:?} {:?}\n", recipe.reference, recipe.packages, recipe.command, recipe.folders);
    for (source, _) in recipe.overlay {
        let content = fs::read(root().join(source)).with_context(|| format!("cannot read {source}"))?;
        text += &String::from_utf8(content).unwrap_or_else(|binary| {
            let mut hasher = DefaultHasher::new();
            binary.as_bytes().hash(&mut hasher);
            format!("{source} {:016x}\n", hasher.finish())
        });
    }
    Ok(text)
}

fn build(recipe: &Recipe, folder: &Path, archive: &Path) -> anyhow::Result<()> {
    let work = folder.join(format!("{}.work", recipe.file));
    let _ = fs::remove_dir_all(&work);
    let (debs, rootfs) = (folder.join("packages"), work.join("root"));
    fs::create_dir_all(&debs)?;
    fs::create_dir_all(&rootfs)?;
    for package in recipe.packages {
        let deb = download(&debs, package)?;
        quiet(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&rootfs))?;
    }
    furnish(recipe, &rootfs)?;
    let config = oci::Config {
        reference: recipe.reference,
        command: recipe.command,
        environment: std::iter::once(PATH).chain(recipe.environment.iter().copied()).collect(),
        user: recipe.user,
        stop_signal: recipe.stop_signal,
        port: recipe.port,
        owners: recipe.folders,
    };
    oci::write(&config, &rootfs, archive)?;
    fs::remove_dir_all(&work).context("remove the work folder")
}

/// The package's archive, downloaded once.
pub(crate) fn download(debs: &Path, package: &str) -> anyhow::Result<PathBuf> {
    let find = || -> anyhow::Result<Option<PathBuf>> {
        for entry in fs::read_dir(debs)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with(&format!("{package}_")) && name.ends_with(".deb") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    };
    if let Some(path) = find()? {
        return Ok(path);
    }
    // apt's download sandbox user can't write here; as root it warns and goes on.
    quiet(Command::new("apt-get").args(["download", "-qq", package]).current_dir(debs))?;
    find()?.with_context(|| format!("apt-get download left no archive of {package}"))
}

/// Adds what packages leave to their installation scripts: users, links, folders.
fn furnish(recipe: &Recipe, rootfs: &Path) -> anyhow::Result<()> {
    for path in TRIMMED {
        let _ = fs::remove_dir_all(rootfs.join(path));
    }
    for folder in ["etc", "tmp", "root", "proc", "sys", "dev", "run", "var", "bin", "usr/bin"] {
        fs::create_dir_all(rootfs.join(folder))?;
    }
    fs::write(rootfs.join("etc/passwd"), PASSWD)?;
    fs::write(rootfs.join("etc/group"), GROUP)?;
    fs::write(rootfs.join("etc/nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files dns\n")?;
    for (path, _, _) in recipe.folders {
        fs::create_dir_all(rootfs.join(path))?;
    }
    for (source, destination) in recipe.overlay {
        let destination = rootfs.join(destination);
        if let Some(parent) = destination.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(root().join(source), destination).with_context(|| format!("cannot copy {source}"))?;
    }
    link_applets(rootfs)
}

/// Busybox's commands, where the package lays none of its own.
fn link_applets(rootfs: &Path) -> anyhow::Result<()> {
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| rootfs.join(path));
    let Some(busybox) = busybox.iter().find(|path| path.is_file()) else { return Ok(()) };
    let applets = quiet(Command::new(busybox).arg("--list"))?;
    let inside = Path::new("/").join(busybox.strip_prefix(rootfs)?);
    for applet in applets.lines() {
        let link = rootfs.join("bin").join(applet);
        if !link.exists() && !rootfs.join("usr/bin").join(applet).exists() {
            symlink(&inside, &link).with_context(|| format!("cannot link {applet}"))?;
        }
    }
    Ok(())
}
