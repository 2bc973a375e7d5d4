# What `cmake --install` puts where, and the Debian package that CPack makes of it.
#
#   bin/stellarctl bin/stellariumd      lib/libstellarium.so    include/stellarium.h  share/man/
#   libexec/stellarium/stellarium-mount-holder
#   share/bash-completion/              lib/systemd/system/     lib/sysusers.d/       share/doc/

# --- The library ---------------------------------------------------------------------------------
# The C interface (src/capi), for programs that embed the engine or use a daemon's store.
if(TARGET stellarium)
  install(TARGETS stellarium LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(FILES ${CMAKE_SOURCE_DIR}/include/stellarium.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
endif()

# --- Programs ------------------------------------------------------------------------------------
foreach(program stellarctl stellariumd)
  if(TARGET ${program})
    install(TARGETS ${program} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
endforeach()

if(TARGET stellarium-mount-holder)
  # Beside the folder of the daemon, which starts it.
  install(TARGETS stellarium-mount-holder
          RUNTIME DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/stellarium)
endif()

# --- Pages, completion, licence ------------------------------------------------------------------
file(GLOB man_pages CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/docs/man/*.[1-8])
foreach(page ${man_pages})
  string(REGEX REPLACE ".*\\.([1-8])$" "\\1" section ${page})
  install(FILES ${page} DESTINATION ${CMAKE_INSTALL_MANDIR}/man${section})
endforeach()
if(TARGET stellarctl)
  # The program knows its own completion scripts.
  set(completions ${CMAKE_BINARY_DIR}/packaging/completions)
  file(MAKE_DIRECTORY ${completions})
  add_custom_command(
    OUTPUT ${completions}/stellarctl ${completions}/_stellarctl ${completions}/stellarctl.fish
    COMMAND stellarctl completion bash > ${completions}/stellarctl
    COMMAND stellarctl completion zsh > ${completions}/_stellarctl
    COMMAND stellarctl completion fish > ${completions}/stellarctl.fish
    DEPENDS stellarctl VERBATIM)
  add_custom_target(stellarctl_completions ALL DEPENDS ${completions}/stellarctl)
  install(FILES ${completions}/stellarctl
          DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions)
  install(FILES ${completions}/_stellarctl
          DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/vendor-completions)
  install(FILES ${completions}/stellarctl.fish
          DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
endif()
install(FILES ${CMAKE_SOURCE_DIR}/LICENSE ${CMAKE_SOURCE_DIR}/README.md
              ${CMAKE_SOURCE_DIR}/CHANGELOG.md
        DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/stellarium)

# --- systemd and pkg-config: written while installing, when the prefix is known ------------------
install(CODE "
  set(CMAKE_INSTALL_BINDIR \"${CMAKE_INSTALL_BINDIR}\")
  set(CMAKE_INSTALL_LIBDIR \"${CMAKE_INSTALL_LIBDIR}\")
  set(CMAKE_INSTALL_INCLUDEDIR \"${CMAKE_INSTALL_INCLUDEDIR}\")
  set(PROJECT_VERSION \"${PROJECT_VERSION}\")
  set(PROJECT_DESCRIPTION \"${PROJECT_DESCRIPTION}\")
  set(written \"${CMAKE_BINARY_DIR}/packaging\")
  configure_file(\"${CMAKE_SOURCE_DIR}/packaging/stellariumd.service.in\"
                 \"\${written}/stellariumd.service\" @ONLY)
  configure_file(\"${CMAKE_SOURCE_DIR}/packaging/stellarium.sysusers.in\"
                 \"\${written}/stellarium.conf\" @ONLY)
  configure_file(\"${CMAKE_SOURCE_DIR}/packaging/stellarium.pc.in\"
                 \"\${written}/stellarium.pc\" @ONLY)
")
install(FILES ${CMAKE_BINARY_DIR}/packaging/stellariumd.service DESTINATION lib/systemd/system)
install(FILES ${CMAKE_BINARY_DIR}/packaging/stellarium.conf DESTINATION lib/sysusers.d)
install(FILES ${CMAKE_BINARY_DIR}/packaging/stellarium.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

# --- The Debian package --------------------------------------------------------------------------
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME stellarium-engine)  # `stellarium` is a planetarium program in Debian.
set(CPACK_PACKAGE_VENDOR "The Stellarium developers")
set(CPACK_PACKAGE_CONTACT "The Stellarium developers <maintainers@stellarium.invalid>")
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION admin)
set(CPACK_DEBIAN_PACKAGE_DESCRIPTION
    "content-addressed storage engine for microVMs
 Gives every virtual machine its disk out of one content-addressed store:
 each unique byte is kept once, a clone is a pointer, a snapshot is a hash.
 Guests in QEMU, Cloud Hypervisor and User-mode Linux reach their disks
 through vhost-user-blk sockets of the daemon, stellariumd; stellarctl
 imports images and manages volumes and snapshots.")
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_DEPENDS "adduser")
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "qemu-utils, fuse3")
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA
    ${CMAKE_SOURCE_DIR}/packaging/debian/postinst ${CMAKE_SOURCE_DIR}/packaging/debian/prerm
    ${CMAKE_SOURCE_DIR}/packaging/debian/postrm)
include(CPack)
