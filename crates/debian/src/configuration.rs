//! The configuration file beside an image, and what its seed disk says.

use std::path::Path;

use crate::recipe::Recipe;

/// The files that a configuration names, absolute.
pub(crate) struct Files<'a> {
    pub image: &'a Path,
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub seed: Option<&'a Path>,
}

/// A configuration of xl.cfg(5) that boots the image.
pub(crate) fn domain(recipe: &Recipe, files: &Files<'_>) -> String {
    let mut disks = vec![format!(
        "format={}, vdev=xvda, access=rw, target={}",
        recipe.format.word(),
        files.image.display()
    )];
    if let Some(seed) = files.seed {
        disks.push(format!(
            "format=raw, vdev=xvdb, access=ro, target={}",
            seed.display()
        ));
    }
    let disks: Vec<String> = disks.iter().map(|disk| quoted(disk)).collect();
    format!(
        "# Debian {}, made by `hospes image debian'. Start it: hospes create -c THIS-FILE\n\
         name = {}\n\
         type = \"pvh\"\n\
         memory = {}\n\
         vcpus = {}\n\
         kernel = {}\n\
         ramdisk = {}\n\
         extra = \"root=/dev/xvda ro quiet console=hvc0\"\n\
         disk = [ {} ]\n\
         vif = [ \"\" ]\n",
        recipe.suite,
        quoted(&recipe.hostname),
        recipe.memory_mb,
        recipe.vcpus,
        quoted(&files.kernel.display().to_string()),
        quoted(&files.initrd.display().to_string()),
        disks.join(",\n         "),
    )
}

/// A text of the configuration grammar, in double quotes.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// cloud-init's meta-data: who this guest is.
pub(crate) fn meta_data(hostname: &str) -> String {
    format!("instance-id: {hostname}\nlocal-hostname: {hostname}\n")
}

/// cloud-init's user-data for a guest whose user has not written one.
pub(crate) fn user_data(hostname: &str, keys: &str) -> String {
    let mut text = format!("#cloud-config\nhostname: {hostname}\ndisable_root: false\n");
    let keys: Vec<&str> = keys
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    if !keys.is_empty() {
        text.push_str("ssh_authorized_keys:\n");
        for key in keys {
            // A JSON string is a YAML string.
            let key = key.replace('\\', "\\\\").replace('"', "\\\"");
            text.push_str(&format!("  - \"{key}\"\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Format;

    #[test]
    fn domain_names_every_file() {
        let mut recipe = Recipe::new("web.qcow2");
        recipe.format = Format::Qcow2;
        let files = Files {
            image: Path::new("/g/we\"b.qcow2"),
            kernel: Path::new("/g/web.vmlinuz"),
            initrd: Path::new("/g/web.initrd"),
            seed: Some(Path::new("/g/web-seed.iso")),
        };
        let text = domain(&recipe, &files);
        assert!(text.contains("kernel = \"/g/web.vmlinuz\"\n"), "{text}");
        assert!(
            text.contains("\"format=qcow2, vdev=xvda, access=rw, target=/g/we\\\"b.qcow2\",\n"),
            "{text}"
        );
        assert!(
            text.contains("\"format=raw, vdev=xvdb, access=ro, target=/g/web-seed.iso\" ]\n"),
            "{text}"
        );
    }

    #[test]
    fn user_data_lists_keys() {
        let text = user_data("web", "ssh-ed25519 AAAA me \"x\"\n\n");
        assert!(
            text.ends_with("ssh_authorized_keys:\n  - \"ssh-ed25519 AAAA me \\\"x\\\"\"\n"),
            "{text}"
        );
        assert!(!user_data("web", "\n").contains("authorized"));
    }
}
