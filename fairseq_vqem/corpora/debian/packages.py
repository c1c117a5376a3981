"""Which packages hold the text of each group; ``{lang}`` stands for the other language."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_MAN_PAGES = """
manpages-{lang} manpages-{lang}-dev manpages manpages-dev man-db systemd util-linux passwd procps
login e2fsprogs mount fdisk uuid-runtime bsdextrautils bsdutils udev systemd-sysv systemd-container
systemd-boot systemd-coredump systemd-homed systemd-journal-remote systemd-oomd systemd-resolved
systemd-timesyncd systemd-userdbd libpam-systemd openssh-client openssh-server grep sed tar
findutils gzip bzip2 diffutils nano less make texinfo cron anacron parted nfs-common
nfs-kernel-server sane-utils libsane1 mtools dosfstools kmod init-system-helpers grub-common
grub2-common btrfs-progs recutils vorbis-tools groff groff-base cpio hostname kbd sysstat
libcrypt-dev uuid-dev bsdgames ed file wdiff debhelper devscripts po4a aptitude apt apt-utils dpkg
dpkg-dev debconf coreutils bash gettext mutt
"""
_HTML_DOCUMENTATION = """
gimp-help-en gimp-help-{lang} debian-handbook debian-reference-en debian-reference-{lang}
developers-reference developers-reference-{lang} debian-faq debian-faq-{lang} maint-guide
maint-guide-{lang} installation-guide-amd64 debian-edu-doc-en debian-edu-doc-{lang}
"""
_KDE = """
dolphin konsole okular kate5-data plasma-desktop-data plasma-workspace-data kalzium-data kmail
kleopatra marble-data kaddressbook korganizer skrooge-common kmymoney-common step kdenlive-data
kstars-data kdevelop-l10n kpat kmahjongg kigo kmines ksudoku knetwalk kturtle kig kmplot kalgebra
cantor umbrello lokalize akregator konqueror kget k3b-data kwordquiz khangman ktouch-data
kgeography-data kbruch ktimer kcharselect kfind ark gwenview kcalc kgpg kwalletmanager kontact
knotes kalarm kdeconnect kteatime krdc krfb kompare kcachegrind cervisia dragonplayer juk elisa
krusader kid3-core tellico-data kphotoalbum labplot rkward kmousetool kruler kolourpaint
konversation-data ktorrent-data kio khelpcenter kinfocenter systemsettings kwin-data
"""
_GNOME = "gnome-user-docs evolution-common shotwell-common gedit-common totem-common rhythmbox-data"
_WESNOTH_PARTS = "data did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs"
_GAMES = (
    " ".join(f"wesnoth-1.16-{part}" for part in _WESNOTH_PARTS.split())
    + " freeciv-data fillets-ng-data minetest-data"
)
_CATALOGUES = """
gcc-12-locales postgresql-15 postgresql-client-15 git gramps mercurial-common gnucash-common
vlc-l10n weechat-core gimp-data calligrasheets-data calligra-data subversion coreutils blender-data
gnupg-l10n lyx-common darktable audacity-data gnumeric-common libgtk-3-common libgtk-4-common
kile-l10n pidgin-data grisbi-common tortoisehg aptitude-common picard gettext libglib2.0-data
libc-l10n evolution-data-server-common bash krita-l10n gnome-control-center-data nautilus-data gajim
dnf-data binutils-common synaptic poedit-common homebank-data liferea-data deluge-common
gnome-shell-common digikam-data inkscape mutt dpkg apt libreoffice-l10n-{lang}
"""

GROUP_PACKAGES: dict[str, str] = {
    "lohelp": "libreoffice-help-en-us libreoffice-help-{lang}",
    "ddtp": "",
    "man": _MAN_PAGES,
    "docs": _HTML_DOCUMENTATION,
    "kde": _KDE,
    "gnome": _GNOME,
    "games": _GAMES,
    "games-large": "freedroidrpg-data widelands-data",
    "mo": _CATALOGUES,
    "ding": "trans-de-en",
}
# Dictionary of one language pair only.
GROUP_LANGUAGES = {"ding": frozenset({"de"})}
# Short interface strings lack the context that would make them fair test sentences.
LABELS_KEPT_FROM_EVALUATION = frozenset({"mo"})


@dataclass(frozen=True)
class PageSet:
    """HTML pages of one manual: paths inside the unpacked packages.

    In `other_page`, ``{name}`` is the file name of the English page, with ``.en.`` replaced.
    """

    label: str
    english_package: str
    english_pages: str
    other_package: str
    other_page: str


_DOC = "usr/share/doc"
PAGE_SETS = (
    PageSet(
        "gimphelp",
        "gimp-help-en",
        "usr/share/gimp/2.0/help/en/*.html",
        "gimp-help-{lang}",
        "usr/share/gimp/2.0/help/{lang}/{name}",
    ),
    PageSet(
        "debdocs",
        "debian-handbook",
        f"{_DOC}/debian-handbook/html/en-US/*.html",
        "debian-handbook",
        f"{_DOC}/debian-handbook/html/{{lang}}-*/{{name}}",
    ),
    PageSet(
        "debdocs",
        "debian-reference-en",
        "usr/share/debian-reference/*.en.html",
        "debian-reference-{lang}",
        "usr/share/debian-reference/{name}",
    ),
    PageSet(
        "debdocs",
        "developers-reference",
        "usr/share/developers-reference/*.html",
        "developers-reference-{lang}",
        "usr/share/developers-reference/{lang}/{name}",
    ),
    PageSet(
        "debdocs",
        "debian-faq",
        f"{_DOC}/debian/FAQ/*.en.html",
        "debian-faq-{lang}",
        f"{_DOC}/debian/FAQ/{{lang}}/{{name}}",
    ),
    PageSet(
        "debdocs",
        "maint-guide",
        f"{_DOC}/maint-guide/html/*.html",
        "maint-guide-{lang}",
        f"{_DOC}/maint-guide-{{lang}}/html/{{name}}",
    ),
    PageSet(
        "debdocs",
        "installation-guide-amd64",
        f"{_DOC}/installation-guide-amd64/en/*.html",
        "installation-guide-amd64",
        f"{_DOC}/installation-guide-amd64/{{lang}}/{{name}}",
    ),
    PageSet(
        "debdocs",
        "debian-edu-doc-en",
        f"{_DOC}/debian-edu-doc-en/*.html",
        "debian-edu-doc-{lang}",
        f"{_DOC}/debian-edu-doc-{{lang}}/{{name}}",
    ),
)


def packages_of(group: str, lang: str) -> list[str]:
    """Return the names of a group's packages; some may not exist for `lang`."""
    suffix = lang.lower().replace("_", "-")
    return GROUP_PACKAGES[group].replace("{lang}", suffix).split()


def groups_for(lang: str) -> list[str]:
    """Return the groups that can have text in `lang`, in the order they are built."""
    return [group for group in GROUP_PACKAGES if is_offered(group, lang)]


def is_offered(group: str, lang: str) -> bool:
    """Return whether a group can have text in `lang`."""
    languages: Iterable[str] = GROUP_LANGUAGES.get(group, (lang,))
    return lang in languages
